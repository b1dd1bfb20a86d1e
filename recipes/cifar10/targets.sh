#!/bin/sh
# What heads learn from, a run each: two residual heads on a frozen cifar_resnet56 and every fifth CIFAR-10 image.
# Run it from the project's root: sh recipes/cifar10/targets.sh. About half an hour on one core. Runs that exist are kept.
set -e
data=${DATA:-../shared/data/cifar10} weights=${WEIGHTS:-../shared/weights} out=${OUT:-runs}
small=$out/cifar10_fifth

if [ ! -f "$small/train.tar" ]; then
    mkdir -p "$small/images"
    tar tf "$data/train.tar" | awk 'NR % 5 == 1' > "$small/names"
    tar xf "$data/train.tar" -C "$small/images" -T "$small/names"
    tar cf "$small/part" -C "$small/images" -T "$small/names"
    cp -f "$data/calibration.tar" "$data/validation.tar" "$small"
    mv "$small/part" "$small/train.tar"
fi

augment() { # name options...
    run=$out/$1
    shift
    [ -f "$run/metrics.json" ] || ptee augment --model cifar_resnet56 --weights "$weights/cifar_resnet56.safetensors" \
        --data "$small" --exits 0.4,0.7 --head auto --head-budget 0.03 --epochs 10 --confidence learned \
        --set training.shift=4 --set training.views=1 --set training.optimizer=muon --set training.lr=0.01 \
        --set training.weight_decay=0.05 --set training.schedule=cosine --no-speed --out "$run" --overwrite "$@"
}

augment labels --loss separate --targets labels
augment pseudo --loss separate --targets pseudo
augment soft_2 --loss separate --targets soft --set training.temperature=2
augment joint --loss joint --targets labels
augment joint_each_exit --loss joint_each_exit --targets labels
ptee compare "$out/labels" "$out/pseudo" "$out/soft_2" "$out/joint" "$out/joint_each_exit" --data "$data" \
    --lines own,max_prob,oracle
