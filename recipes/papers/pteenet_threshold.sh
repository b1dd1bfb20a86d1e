#!/bin/sh
# The threshold T for a frozen ResNet-110 with ten exits (PTEENet, figure 4), beside BranchyNet, Zero Time Waste, patience, smaller
# networks and a cut-off one; and the same exits one by one (its future work).
# Run it from the project's root: sh recipes/papers/pteenet_threshold.sh. Complete runs are kept, and the same command goes on.
# The settings of the official code: 30 epochs, Adam .0005, loss v2, lambda .9. SMALL=1: 6 epochs of a tenth of the images.
# SEED=1 takes another seed, in a folder of its own.
set -e
shared=${SHARED:-../shared} out=${OUT:-runs/pteenet_threshold$SMALL${SEED:+_seed$SEED}} data=${DATA:-$shared/data/cifar10} weights=$shared/weights
steps="--epochs 30 --set training.lr=0.0005" fewer="--epochs 30 --set training.lr=0.0005" each="--epochs 30 --set training.lr=0.0005"
mkdir -p "$out"
if [ -n "$SMALL" ]; then
    python recipes/scripts/piece.py "$data" "$out/piece" --every 10
    larger="--batch-size 64 --set training.lr=0.003 --set training.schedule=cosine"
    data=$out/piece steps="--epochs 6 $larger" fewer="--epochs 4 $larger" each="--epochs 1 $larger"
fi

fit() { # run recipe exits options...
    run=$out/$1 recipe=$2 exits=$3
    shift 3
    [ -f "$run/metrics.json" ] || ptee augment --recipe "$recipe" --model cifar_resnet110 --weights "$weights/cifar_resnet110.safetensors" \
        --data "$data" --num-exits "$exits" --no-speed --overwrite --out "$run" ${SEED:+--seed $SEED} "$@"
}

# shellcheck disable=SC2086 - several words
{
    fit pteenet pteenet 10 --loss v2 --cost-weight 0.9 $steps
    fit branchynet branchynet 5 $fewer
    fit ztw ztw 5 $fewer
    [ -n "$NO_ORDER" ] || fit one_by_one pteenet 10 --loss v2 --cost-weight 0.9 --set "training.order=one by one" $each
}
python recipes/scripts/thresholds.py "$out/pteenet" --csv "$out/thresholds.csv"
ptee plot "$out/pteenet" --kind threshold --out "$out/threshold.png"
smaller="--static cifar_resnet20=$weights/cifar_resnet20.safetensors --static cifar_resnet56=$weights/cifar_resnet56.safetensors"
# shellcheck disable=SC2086
ptee compare "$out"/pteenet "$out"/branchynet "$out"/ztw $smaller --json > "$out/compare.json"
ptee plot "$out/branchynet" $smaller --out "$out/curve.png"
python recipes/scripts/shares.py "$out"/*/ --csv "$out/table.csv"
