#!/bin/sh
# Early exits on every ImageNet backbone whose weights are there, on Imagenette, at most two points of fidelity lost.
# Run from the project's root: sh recipes/imagenette.sh. About half an hour each on one core; runs that are there already are kept.
set -e
data=${DATA:-../shared/data/imagenette} weights=${WEIGHTS:-../shared/weights} out=${OUT:-runs}

augment() { # name options...
    run=$out/$1
    shift
    [ -f "$run/metrics.json" ] || ptee augment --data "$data" --max-fidelity-drop 0.02 --no-speed --out "$run" --overwrite "$@"
}

augment mobilenetv2 --model mobilenetv2_100 --model-arg pad_type=same --mean 0.5 --std 0.5 \
    --weights "$weights/mobilenetv2_100.safetensors"
augment lite0 --model tf_efficientnet_lite0 --mean 0.5 --std 0.5 --weights "$weights/tf_efficientnet_lite0.safetensors"
augment squeezenet --model torchvision/squeezenet1_1 --weights "$weights/squeezenet1_1.safetensors"
augment vit_tiny --model vit_tiny_patch16_224 --mean 0.5 --std 0.5 --weights "$weights/vit_tiny_patch16_224.safetensors"
