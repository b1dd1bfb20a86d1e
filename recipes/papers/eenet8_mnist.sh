#!/bin/sh
# EENet-8 on MNIST, from scratch with its exits: the losses (thesis, table 4.1), lambda (table 4.2, figure 4.8), and of one run with
# lambda SPREAD the epochs (figure 4.9) and galleries of what leaves where (figures 4.10 to 4.12).
# Run it from the project's root: sh recipes/papers/eenet8_mnist.sh. Complete runs are kept, and the same command goes on.
# The thesis's settings; SMALL=1: twelve and three epochs instead of 20, with larger steps. ROOT holds torchvision's MNIST.
# SEED=1 takes another seed, in a folder of its own.
set -e
root=${ROOT:-../shared/data/mnist} out=${OUT:-runs/eenet8${SEED:+_seed$SEED}} lambdas=${LAMBDAS:-0.5,0.7,0.9,0.95,1.0,1.05,1.1,1.15,1.3,1.5}
steps=${SMALL:+--over training.batch_size=64 --over training.lr=0.01 --over training.schedule=cosine}

fit() { # folder filters epochs options...
    folder=$out/$1 filters=$2 epochs=${SMALL:+--over training.epochs=$3}
    shift 3
    # shellcheck disable=SC2086 - the steps are several words
    ptee sweep recipes/papers/eenet8.yaml --model eenet8 --no-pretrained --model-arg filters="$filters" \
        --data MNIST --data-root "$root" --out "$folder" "$@" $epochs $steps ${SEED:+--over seed=$SEED}
}

[ -n "$NO_LOSSES" ] || fit losses 2 12 --over training.loss=mc,cost,joint,joint_each_exit
fit lambda 4 3 --over training.cost_weight="$lambdas"
python recipes/scripts/shares.py "$out"/*/*/ --csv "$out/table.csv"
ptee plot "$out/lambda" --kind lambda --out "$out/lambda.png"
spread=$(ls -d "$out"/lambda/cost_weight=${SPREAD:-0.95}_*)
for kind in epochs exits gallery; do
    ptee plot "$spread" --kind $kind --out "$out/$kind.png"
done
