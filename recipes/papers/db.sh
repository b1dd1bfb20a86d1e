#!/bin/sh
# AlexNet, VGG-13 and ResNet-18 alone, as B-Net and by differentiable branching (DB, tables 1 and 2, figure 4), from scratch.
# Run it from the project's root: sh recipes/papers/db.sh. ROOT holds torchvision's CIFAR10. Complete runs are kept,
# and the same command goes on.
# SMALL=1: a twentieth of the images, 6 epochs, cost weight .1 only; the AlexNet unless NETWORKS says otherwise.
# SEED=1 takes another seed, in a folder of its own.
set -e
data="--data ${DATA:-CIFAR10} --data-root ${ROOT:-data}" shared=${SHARED:-../shared} out=${OUT:-runs/db$SMALL${SEED:+_seed$SEED}}
networks=${NETWORKS:-cifar_alexnet cifar_vgg13 cifar_resnet18} steps=""
mkdir -p "$out"
if [ -n "$SMALL" ]; then
    python recipes/scripts/piece.py "$shared/data/cifar10" "$out/piece" --every 20 --report 4
    data="--data $out/piece" networks=${NETWORKS:-cifar_alexnet}
    steps="--epochs 6 --set training.schedule=cosine"
fi

fit() { # run network options...
    run=$out/$1 network=$2
    shift 2
    go=--overwrite
    [ ! -f "$run/checkpoint.safetensors" ] || go=--resume # it was interrupted
    # shellcheck disable=SC2086 - several words
    [ -f "$run/metrics.json" ] || ptee augment --model "$network" --no-pretrained $data --exits linear --num-exits 3 --head pool \
        "$@" $steps ${SEED:+--seed $SEED} --no-speed $go --out "$run"
}

for network in $networks; do
    fit "${network}_alone" "$network" --recipe branchynet-joint --set 'training.exit_weights=[0,0,0,1]'
    fit "${network}_bnet" "$network" --recipe branchynet-joint
    [ -n "$SMALL" ] || fit "${network}_db" "$network" --recipe db-joint
    fit "${network}_db0.1" "$network" --recipe db-joint --cost-weight 0.1
    ptee plot "$out/${network}_db0.1" --kind confidence --out "$out/${network}_confidence.png"
done
python recipes/scripts/shares.py "$out"/cifar_*/ --csv "$out/table.csv" --sweep "$out"
python recipes/scripts/soft.py "$out"/cifar_*/ --csv "$out/soft.csv"
ptee plot "$out" --out "$out/curve.png"
