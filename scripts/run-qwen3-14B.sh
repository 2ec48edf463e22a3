#!/usr/bin/env bash
# GRPO of Qwen3-14B on one node of 8 GPUs: TP4, 2 data-parallel replicas, 4 SGLang engines of 2 GPUs.
# Memory of a rank (3.7e9 of 14.8e9): weights 7.4 GB bf16, gradients 14.8 GB fp32, optimizer 12 bytes / 2 ranks 22.2 GB;
# with recomputation 102 kB of activations a token (40 layers x 5120 x 2 bytes / TP4), 0.9 GB at 9,216 tokens.
# Host of the node: 295 GB (reference; weights and optimizer while engines generate). Engines keep 14.8 GB on each GPU.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-14B.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/models/qwen3-14B.sh"
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-14B"
   --ref-load "$MODEL_DIR/Qwen3-14B_torch_dist"
   --load "$OUTPUT_DIR/Qwen3-14B_qwench"
   --save "$OUTPUT_DIR/Qwen3-14B_qwench"
   --save-interval 20
)

PERF_ARGS=(
   --tensor-model-parallel-size 4
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
