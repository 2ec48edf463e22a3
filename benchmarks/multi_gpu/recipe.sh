#!/usr/bin/env bash
# Rollouts of a recipe with random weights of the model's real size, then a table of what they took. Responses are forced to 1,024
# tokens, rewards are drawn, nothing is evaluated, and the checkpoint at the end has no optimizer.
# Usage: MODEL_DIR=... PROMPTS=prompts.jsonl QWEN_TIKTOKEN=qwen.tiktoken [OUTPUT_DIR=runs] \
#        bash benchmarks/multi_gpu/recipe.sh SIZE SCRIPT [more flags]
#   bash benchmarks/multi_gpu/recipe.sh 4B run-qwen3-4B_4xgpu.sh
#   bash benchmarks/multi_gpu/recipe.sh 4B run-qwen3-4B_4xgpu.sh --actor-num-gpus-per-node 2
#   bash benchmarks/multi_gpu/recipe.sh 4B run-qwen3-4B-fsdp.sh --attn-implementation varlen
#   bash benchmarks/multi_gpu/recipe.sh 32B run-qwen3-32B.sh --num-rollout 1
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SIZE=${1:?the size, for example 4B} SCRIPT=${2:?a recipe of scripts/, for example run-qwen3-4B_4xgpu.sh}
shift 2
: "${MODEL_DIR:?the folder of the checkpoints}" "${PROMPTS:?a jsonl file of prompt and label}" "${OUTPUT_DIR:=runs}"
export MODEL_DIR OUTPUT_DIR DATA_DIR=${DATA_DIR:-$(dirname "$PROMPTS")}
MODEL=$MODEL_DIR/Qwen3-$SIZE
LOGS=$OUTPUT_DIR/${SCRIPT%.sh}

[ -d "$MODEL" ] || qwench make-model --size "$SIZE" --tokenizer qwen --qwen-tiktoken "$QWEN_TIKTOKEN" --output "$MODEL"
if [[ " $* " != *" --ref-load"[\ =]* ]] && grep -q _torch_dist "$HERE/../../scripts/$SCRIPT" && [ ! -d "${MODEL}_torch_dist" ]; then
   qwench convert --input "$MODEL" --to torch_dist --output "${MODEL}_torch_dist"
fi
if [[ $SCRIPT == low_precision/* ]] && [ ! -d "$MODEL-FP8" ]; then
   qwench convert --input "$MODEL" --to fp8 --output "$MODEL-FP8"
fi

bash "$HERE/../../scripts/$SCRIPT" --prompt-data "$PROMPTS" --eval-prompt-data none "$PROMPTS" --skip-eval-before-train \
   --num-rollout 3 --rollout-max-response-len 1024 --rollout-ignore-eos --rm-type random --no-save-optim \
   --log-dir "$LOGS" "$@"
[[ " $* " == *" --dry-run "* ]] || python "$HERE/rollout_times.py" "$LOGS/metrics.jsonl"
