#!/bin/sh
# What heads are taught, a run each: two learned heads on a frozen cifar_resnet56 and every fifth CIFAR-10 image.
# Run from the project's root: sh recipes/targets.sh. About half an hour on one core; runs that are there already are kept.
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
        --data "$small" --exits 0.4,0.7 --head auto --head-budget 0.03 --shift 4 --epochs 10 \
        --optimizer muon --lr 0.01 --weight-decay 0.05 --schedule cosine --calibrate none --no-speed --out "$run" --overwrite "$@"
}

augment labels --loss each --targets labels
augment pseudo --loss each --targets pseudo
augment soft_2 --loss each --targets soft --temperature 2
augment soft_2_reach --loss each --targets soft --temperature 2 --reach
augment joint_v1 --loss v1 --targets labels
augment joint_v2 --loss v2 --targets labels
ptee compare "$out/labels" "$out/pseudo" "$out/soft_2" "$out/soft_2_reach" "$out/joint_v1" "$out/joint_v2" \
    --data "$data" --lines own,max_prob,oracle
