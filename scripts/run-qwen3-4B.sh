#!/usr/bin/env bash
# GRPO of Qwen3-4B on one node of 8 GPUs: TP2, 4 data-parallel replicas, 4 SGLang engines of 2 GPUs, in turns on the same GPUs.
# Memory of a rank (2.0e9 of 4.0e9): weights 4.0 GB bf16, gradients 8.0 GB fp32, optimizer 12 bytes / 4 ranks 6.0 GB;
# with recomputation 92 kB of activations a token (36 layers x 2560 x 2 bytes / TP2), 0.8 GB at 9,216 tokens.
# Host of the node: 113 GB (reference; weights and optimizer while engines generate). Engines keep 4.0 GB on each GPU.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-4B.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/models/qwen3-4B.sh"
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-4B"
   # Rollouts in FP8, training in BF16:
   # --hf-checkpoint "$MODEL_DIR/Qwen3-4B-FP8"
   --ref-load "$MODEL_DIR/Qwen3-4B_torch_dist"
   --load "$OUTPUT_DIR/Qwen3-4B_qwench"
   --save "$OUTPUT_DIR/Qwen3-4B_qwench"
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
