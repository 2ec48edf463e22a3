#!/usr/bin/env bash
# GRPO of Qwen3-1.7B on one node of 8 GPUs: 8 data-parallel Megatron ranks, an SGLang engine on each.
# Memory of a rank (1.7e9): weights 3.4 GB bf16, gradients 6.9 GB fp32, optimizer 12 bytes / 8 ranks 2.6 GB; with full
# recomputation 115 kB of activations a token (28 layers x 2048 x 2 bytes), 2.3 GB at 20,480 tokens.
# Host of the node: 76 GB (reference; weights and optimizer while engines generate). Engines keep 3.4 GB on each GPU.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-1.7B.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/models/qwen3-1.7B.sh"
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-1.7B"
   --ref-load "$MODEL_DIR/Qwen3-1.7B_torch_dist"
   --load "$OUTPUT_DIR/Qwen3-1.7B_qwench"
   --save "$OUTPUT_DIR/Qwen3-1.7B_qwench"
   --save-interval 20
)

PERF_ARGS=(
   --tensor-model-parallel-size 1
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 20480
)

SGLANG_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.7
)

qwench train --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate \
   "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
   "${MEGATRON_ARGS[@]}" "${PERF_ARGS[@]}" "${SGLANG_ARGS[@]}" "$@"
