#!/bin/sh
# Lambda of the loss for ResNet-110, VGG-19 and DenseNet-121, frozen, with several numbers of exits (PTEENet, figure 3).
# Run it from the project's root: sh recipes/papers/pteenet_lambda.sh. Complete runs are kept, and the same command goes on.
# The paper's settings: 50 epochs of all images. SMALL=1: 3 epochs of a twentieth of them, larger steps, fewer values.
# SEED=1 takes another seed, in a folder of its own.
set -e
shared=${SHARED:-../shared} out=${OUT:-runs/pteenet_lambda$SMALL${SEED:+_seed$SEED}} data=${DATA:-$shared/data/cifar10}
lambdas=${LAMBDAS:-0.1,0.3,0.5,0.7,0.9,1.1,1.3,1.5,1.7} resnet=${RESNET:-3,5,10} others=${OTHERS:-2,3} head=${DENSE:-conv2}
steps="--over training.epochs=50 --over training.lr=0.0005"
mkdir -p "$out"
if [ -n "$SMALL" ]; then
    python recipes/scripts/piece.py "$data" "$out/piece" --every 20 --report 4
    data=$out/piece lambdas=${LAMBDAS:-0.3,0.9,1.7} resnet=${RESNET:-5,10} others=${OTHERS:-3} head=${DENSE:-pool}
    steps="--over training.epochs=3 --over training.lr=0.003 --over training.batch_size=32 --over training.schedule=cosine"
fi

lambda() { # network exits options...
    network=$1 exits=$2
    shift 2
    # shellcheck disable=SC2086 - several words
    ptee sweep pteenet --model "$network" --weights "$shared/weights/$network.safetensors" --data "$data" --out "$out/$network" \
        --over training.cost_weight="$lambdas" --over exits.number="$exits" --over training.loss=v2 $steps ${SEED:+--over seed=$SEED} "$@"
    python recipes/scripts/shares.py "$out/$network"/*/ --csv "$out/$network.csv"
    ptee plot "$out/$network" --kind lambda --out "$out/${network}_lambda.png"
    ptee plot "$out/$network" --out "$out/${network}_curve.png"
}

for network in ${NETWORKS:-cifar_resnet110 cifar_vgg19 cifar_densenet121}; do
    case $network in
        cifar_resnet110) lambda "$network" "$resnet" ;;
        cifar_vgg19) lambda "$network" "$others" --over exits.places=linear ;;
        *) lambda "$network" "$others" --over exits.places=linear --over exits.head="$head" ;;
    esac
done
