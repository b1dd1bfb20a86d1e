#!/bin/sh
# Early exits on every ImageNet backbone whose weights are there, on Imagenette, at most two points of fidelity lost; three seeds.
# Run it from the project's root: sh recipes/imagenette/run.sh. About 20 minutes a run on one core. Runs that exist are kept.
set -e
data=${DATA:-../shared/data/imagenette} weights=${WEIGHTS:-../shared/weights} out=${OUT:-runs/imagenette}
mkdir -p "$out"

augment() { # seed name options...
    run=$out/$2$1 seed=$1
    shift 2
    [ -f "$run/metrics.json" ] || ptee augment --data "$data" --recipe recipes/imagenette/recipe.yaml --seed "$seed" --no-speed --out "$run" \
        --overwrite "$@"
}

for seed in ${SEEDS:-0 1 2}; do
    augment "$seed" mobilenet --model mobilenetv2_100 --model-arg pad_type=same --mean 0.5 --std 0.5 \
        --weights "$weights/mobilenetv2_100.safetensors"
    augment "$seed" lite --model tf_efficientnet_lite0 --mean 0.5 --std 0.5 --weights "$weights/tf_efficientnet_lite0.safetensors"
    augment "$seed" squeezenet --model torchvision/squeezenet1_1 --weights "$weights/squeezenet1_1.safetensors"
    augment "$seed" vit --model vit_tiny_patch16_224 --mean 0.5 --std 0.5 --weights "$weights/vit_tiny_patch16_224.safetensors"
done
python recipes/scripts/means.py "$out"/mobilenet? "$out"/lite? "$out"/squeezenet? "$out"/vit?
