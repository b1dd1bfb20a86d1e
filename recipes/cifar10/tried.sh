#!/bin/sh
# What else might tell better which answers are wrong: heads trained in ten ways, three seeds, compared where as much is really lost.
# Run it from the project's root: sh recipes/cifar10/tried.sh. About five hours on one core. Complete runs are kept. SEEDS=0 takes one seed.
set -e
data=${DATA:-../shared/data/cifar10} weights=${WEIGHTS:-../shared/weights} out=${OUT:-runs/tried}

python recipes/scripts/variants.py "$out" --seeds "${SEEDS:-0,1,2}" --data "$data" --weights "$weights"
python recipes/scripts/equal_loss.py "$out"/*[0-9] --base one --agreement three --classes one
python recipes/scripts/equal_loss.py "$out"/three[0-9] "$out"/stagewise[0-9]
