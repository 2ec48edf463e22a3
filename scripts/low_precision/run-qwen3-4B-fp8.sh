#!/usr/bin/env bash
# GRPO of Qwen3-4B with rollouts in FP8 and training in BF16, on one node of 8 GPUs: TP2, SGLang engines of 2 GPUs.
# The FP8 checkpoint gives the engines their layout; the trainer starts from the BF16 weights of --ref-load.
# Memory of a rank: as in run-qwen3-4B.sh; an engine keeps about half the weights.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/low_precision/run-qwen3-4B-fp8.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")/..
source "$HERE/models/qwen3-4B.sh"
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-4B-FP8"
   --ref-load "$MODEL_DIR/Qwen3-4B_torch_dist"
   --load "$OUTPUT_DIR/Qwen3-4B-FP8_qwench"
   --save "$OUTPUT_DIR/Qwen3-4B-FP8_qwench"
   --save-interval 20
)

PERF_ARGS=(
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
)

SGLANG_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus-per-engine 2
   --sglang-mem-fraction-static 0.7
)

qwench train --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate \
   "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
   "${MEGATRON_ARGS[@]}" "${PERF_ARGS[@]}" "${SGLANG_ARGS[@]}" "$@"
