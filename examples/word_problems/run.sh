#!/usr/bin/env bash
# A small Qwen3, from random weights to solving arithmetic word problems: SFT from scratch, then GRPO. One GPU, a few minutes.
# Usage: OUTPUT_DIR=runs/word_problems SEED=0 bash examples/word_problems/run.sh
set -euo pipefail
OUTPUT_DIR=${OUTPUT_DIR:-runs/word_problems}
SEED=${SEED:-0}
SIZE=${SIZE:-30M}
run=$OUTPUT_DIR/seed$SEED

python "$(dirname "$0")/make_data.py" "$run/data" --seed "$SEED"
[ -d "$run/base" ] || qwench make-model --size "$SIZE" --tokenizer tiny --output "$run/base" --seed "$SEED"

TASK=(--input-key prompt --label-key label --apply-chat-template --rm-type deepscaler)
SAMPLING=(--rollout-max-response-len 128 --rollout-temperature 1.0)
HELD_OUT=(--eval-prompt-data held_out "$run/data/test.jsonl")
TRAINER=(--attn-implementation varlen --use-dynamic-batch-size --max-tokens-per-gpu 32768 --weight-decay 0.1
         --adam-beta1 0.9 --adam-beta2 0.95 --seed "$SEED" --rollout-seed "$SEED" --rollout-shuffle)

# A small model decodes as fast as kernels are launched: everything stays on the GPU, and a rollout's responses run all at once.
ENGINE=(--colocate --no-offload-train --no-offload-rollout --embedded-max-running-requests 512 --embedded-kv-cache-tokens 131072)

qwench sft --hf-checkpoint "$run/base" --prompt-data "$run/data/sft.jsonl" --input-key messages \
    --num-rollout 400 --rollout-batch-size 256 --global-batch-size 256 \
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 40 \
    --save "$run/sft" --save-interval 400 --save-hf "$run/sft-hf" "${TRAINER[@]}"

qwench eval --hf-checkpoint "$run/sft-hf" "${HELD_OUT[@]}" "${TASK[@]}" "${SAMPLING[@]}" "${ENGINE[@]}" --eval-output "$run/eval-sft"

qwench train --hf-checkpoint "$run/sft-hf" --prompt-data "$run/data/train.jsonl" "${TASK[@]}" "${SAMPLING[@]}" \
    --num-rollout 30 --rollout-batch-size 64 --n-samples-per-prompt 8 --global-batch-size 512 \
    --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 \
    --lr 3e-5 --lr-decay-style constant "${ENGINE[@]}" "${HELD_OUT[@]}" --eval-interval 10 \
    --save "$run/grpo" --save-interval 30 --save-hf "$run/grpo-hf" "${TRAINER[@]}"

qwench eval --hf-checkpoint "$run/grpo-hf" "${HELD_OUT[@]}" "${TASK[@]}" "${SAMPLING[@]}" "${ENGINE[@]}" --eval-output "$run/eval-grpo"
