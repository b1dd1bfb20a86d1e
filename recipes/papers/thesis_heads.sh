#!/bin/sh
# Heads plain, pool and bnpool (thesis, table 4.3: EENet-50 on SVHN). Run it from the project's root: sh recipes/papers/thesis_heads.sh
# ROOT holds torchvision's SVHN; DATA=CIFAR10 takes that. SMALL=1: EENet-20 (NETWORK=cifar_resnet50: EENet-50), for 4 epochs of a
# twentieth of CIFAR-10, in larger steps.
# SEED=1 takes another seed, in a folder of its own.
set -e
data=${DATA:-SVHN} root=${ROOT:-data} shared=${SHARED:-../shared} out=${OUT:-runs/thesis_heads$SMALL${SEED:+_seed$SEED}}
heads="--over exits.head=plain,pool,bnpool --over exits.places=quadratic --over exits.number=3"
unit="--over exits.places_by=parameters --over training.cost_unit=parameters ${SEED:+--over seed=$SEED}"
mkdir -p "$out"
if [ -n "$SMALL" ]; then
    python recipes/scripts/piece.py "$shared/data/cifar10" "$out/piece" --every 20 --report 4
    network=${NETWORK:-cifar_resnet20} arg=""
    [ "$network" != cifar_resnet20 ] || arg="--model-arg shortcut=conv"
    # shellcheck disable=SC2086 - several words
    ptee sweep eenet-joint --model "$network" --no-pretrained $arg --data "$out/piece" --out "$out/runs" \
        $heads $unit --over training.epochs=4 --over training.lr=0.003 --over training.schedule=cosine
else
    # shellcheck disable=SC2086
    ptee sweep eenet-joint --model cifar_resnet50 --no-pretrained --data "$data" --data-root "$root" $heads $unit --out "$out/runs"
fi
python recipes/scripts/shares.py "$out"/runs/*/ --csv "$out/table.csv"
ptee plot "$out/runs" --kind lambda --out "$out/heads.png"
