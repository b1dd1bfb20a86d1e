#!/bin/sh
# Early exits on a frozen cifar_resnet56, the papers' recipes and smaller networks, on CIFAR-10; three seeds.
# Run from the project's root: sh recipes/cifar10.sh. About four hours a seed on one core; runs that are there already are kept.
set -e
data=${DATA:-../shared/data/cifar10} weights=${WEIGHTS:-../shared/weights} out=${OUT:-runs}

augment() { # seed name options...
    run=$out/$2$1 seed=$1
    shift 2
    [ -f "$run/metrics.json" ] || ptee augment --model cifar_resnet56 --weights "$weights/cifar_resnet56.safetensors" \
        --data "$data" --seed "$seed" --no-speed --out "$run" --overwrite "$@"
}

for seed in ${SEEDS:-0 1 2}; do
    augment "$seed" ours --max-drop 0.005
    augment "$seed" front --front cifar_resnet20 --front-weights "$weights/cifar_resnet20.safetensors" --max-drop 0.005
    for recipe in pteenet eenet branchynet ztw; do
        augment "$seed" "$recipe" --recipe "$recipe" --epochs "${EPOCHS:-13}" # ours takes 13
    done
done
ptee compare "$out"/ours? "$out"/front? "$out"/pteenet? "$out"/eenet? "$out"/branchynet? "$out"/ztw? --data "$data" \
    --static cifar_resnet20="$weights/cifar_resnet20.safetensors" \
    --static cifar_resnet32="$weights/cifar_resnet32.safetensors" --json > "$out/compare.json"
python recipes/spread.py "$out/compare.json"
