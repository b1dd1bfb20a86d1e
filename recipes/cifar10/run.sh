#!/bin/sh
# Early exits on a frozen cifar_resnet56, the papers' recipes and smaller networks, on CIFAR-10; three seeds.
# Run it from the project's root: sh recipes/cifar10/run.sh. About five hours a seed on one core. Runs that exist are kept.
set -e
data=${DATA:-../shared/data/cifar10} weights=${WEIGHTS:-../shared/weights} out=${OUT:-runs}

augment() { # seed name options...
    run=$out/$2$1 seed=$1
    shift 2
    [ -f "$run/metrics.json" ] || ptee augment --model cifar_resnet56 --weights "$weights/cifar_resnet56.safetensors" \
        --data "$data" --seed "$seed" --no-speed --out "$run" --overwrite "$@"
}

for seed in ${SEEDS:-0 1 2}; do
    augment "$seed" ours --recipe recipes/cifar10/recipe.yaml
    augment "$seed" one_exit --recipe recipes/cifar10/one_exit.yaml
    augment "$seed" previous --recipe recipes/cifar10/recipe.yaml --head auto+
    augment "$seed" front --front cifar_resnet20 --front-weights "$weights/cifar_resnet20.safetensors" --max-drop 0.005
    for recipe in pteenet eenet branchynet ztw; do
        augment "$seed" "$recipe" --recipe "$recipe" --epochs "${EPOCHS:-15}" # ours takes 15
    done
done

compare() { # data file
    ptee compare "$out"/ours? "$out"/one_exit? "$out"/previous? "$out"/front? "$out"/pteenet? "$out"/eenet? "$out"/branchynet? "$out"/ztw? \
        --data "$1" --lines own,blended,one_threshold,max_prob,entropy,oracle,truncation \
        --static cifar_resnet20="$weights/cifar_resnet20.safetensors" \
        --static cifar_resnet32="$weights/cifar_resnet32.safetensors" --json > "$2"
}

compare "$data" "$out/compare.json"
python recipes/scripts/spread.py "$out/compare.json"

# The same the other way round: thresholds from the validation images, reported on the calibration images; then both together.
mkdir -p "$out/exchanged"
here=$(cd "$data" && pwd)
ln -sf "$here/train.tar" "$out/exchanged/train.tar"
ln -sf "$here/calibration.tar" "$out/exchanged/validation.tar"
ln -sf "$here/validation.tar" "$out/exchanged/calibration.tar"
compare "$out/exchanged" "$out/exchanged.json"
python recipes/scripts/spread.py "$out/compare.json" "$out/exchanged.json"
