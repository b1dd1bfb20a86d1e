#!/bin/sh
# EENet-20, 32, 44 and 110 by each placement, beside the plain networks, and EENet-18 (thesis, tables 4.4 to 4.8). DEPTHS=20 is one of them.
# Run it from the project's root: sh recipes/papers/thesis_cifar.sh. Complete runs are kept, and the same command goes on.
# The thesis's settings: from scratch, 200 epochs at most, places and costs by parameters. DATA=SVHN is for tables 4.4 to 4.6.
# SMALL=1: published networks stay frozen; their heads learn for 20 epochs from a twentieth of the images.
# SMALL=scratch: the networks learn with their exits from scratch, for 4 epochs of the same images, in larger steps.
# SEED=1 takes another seed, in a folder of its own.
set -e
data=${DATA:-CIFAR10} root=${ROOT:-data} shared=${SHARED:-../shared} out=${OUT:-runs/thesis_cifar$SMALL${SEED:+_seed$SEED}}
unit="--set exits.places_by=parameters --set training.cost_unit=parameters"
faster="--set training.lr=0.003 --set training.schedule=cosine"
mkdir -p "$out"
[ -z "$SMALL" ] || python recipes/scripts/piece.py "$shared/data/cifar10" "$out/piece" --every 20 --report 4

fit() { # run network options...
    run=$out/$1 network=$2
    shift 2
    [ ! -f "$run/metrics.json" ] || return 0
    # shellcheck disable=SC2086 - several words
    case "$SMALL" in
        "") set -- --recipe eenet-joint --no-pretrained --data "$data" --data-root "$root" "$@" ;;
        scratch) set -- --recipe eenet-joint --no-pretrained --data "$out/piece" --epochs 4 $faster "$@" ;;
        *) set -- --recipe eenet --weights "$shared/weights/$network.safetensors" --data "$out/piece" --epochs 20 --cost-weight 0.95 "$@" ;;
    esac
    ptee augment --model "$network" --head pool --no-speed --overwrite --out "$run" ${SEED:+--seed $SEED} "$@"
}

placed() { # depth rule exits
    arg="--model-arg shortcut=conv" # the thesis's shortcuts have weights; the published networks' have none
    [ "$SMALL" != 1 ] || arg=""
    # shellcheck disable=SC2086 - several words
    fit "$1_$2" "cifar_resnet$1" --exits "$2" --num-exits "$3" $unit $arg
}

plain() { # network: its exits count for nothing
    [ -n "$SMALL" ] || fit "plain_$1" "$1" --num-exits 1 --set training.loss=weighted --set 'training.exit_weights=[0,1]' --set training.cost_weight=null --set confidence.name=max_prob
}

for depth in ${DEPTHS:-20 32 44 110 18}; do
    if [ "$depth" = 18 ]; then
        [ "$SMALL" != 1 ] || continue # there are no published weights
        plain cifar_resnet18
        # shellcheck disable=SC2086
        fit eenet18 cifar_resnet18 --exits quadratic --num-exits 3 $unit
        continue
    fi
    case $depth in
        20) exits="3 3 2 3 2" ;;
        32) exits="4 5 5 5 5" ;;
        44) exits="6 6 6 6 6" ;;
        *) exits="6 10 6 6 10" ;;
    esac
    plain "cifar_resnet$depth"
    for rule in quadratic fine pareto golden linear; do
        case " ${RULES:-$rule} " in *" $rule "*) ;; *) exits=${exits#* } && continue ;; esac
        placed "$depth" "$rule" "${exits%% *}"
        exits=${exits#* }
    done
done
python recipes/scripts/shares.py "$out"/*/ --csv "$out/table.csv" --sweep "$out"
ptee plot "$out" --out "$out/curve.png"
