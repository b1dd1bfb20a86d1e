#!/bin/sh
# All figures of recipes/gpu on one NVIDIA GPU, one after another, without a network: sh recipes/gpu/run.sh
# Run it from the project's root. Tables are printed and kept in runs/gpu. A run that exists there is not trained again.
set -e
data=${DATA:-../shared/data/cifar10} weights=${WEIGHTS:-../shared/weights} out=${OUT:-runs/gpu}
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "There is no NVIDIA GPU that torch can use here. These figures need one." >&2
    exit 2
fi
mkdir -p "$out"

keep() { # file command...: the command's output, shown and kept; ends all if the command fails
    file=$out/$1
    shift
    "$@" >"$file" || { cat "$file"; exit 1; }
    cat "$file"
}

# A trained network on real images, with exits and thresholds chosen by the seconds of each batch size.
run=$out/resnet56
[ -f "$run/metrics.json" ] || ptee augment --recipe recipes/cifar10/recipe.yaml --model cifar_resnet56 \
    --weights "$weights/cifar_resnet56.safetensors" --data "$data" --epochs 5 --set training.views=1 --no-speed --out "$run" --overwrite
keep bench.txt ptee bench "$run" --device cuda --executor hooks,graphs --batch-sizes 1,32,128,512,2048 --save
keep trained.txt python recipes/gpu/trained.py "$run" --max-drop 0.005 --mode graphs

# Untrained networks in half precision: as CUDA graphs, and compiled, which takes longest.
keep graphs.txt python recipes/gpu/speed.py --mode graphs
keep compile.txt python recipes/gpu/speed.py --mode compile --backbone resnet50 --backbone vit_base_patch16_224 --batch 256
