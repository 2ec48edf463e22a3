#!/usr/bin/env bash
# GRPO of Qwen3-32B on one node of 8 GPUs: TP8, one SGLang engine of 8 GPUs, optimizer on the host.
# Memory of a rank (4.1e9 of 32.8e9): weights 8.2 GB bf16, gradients 16.4 GB fp32; with recomputation 82 kB of
# activations a token (64 layers x 5120 x 2 bytes / TP8), 1.7 GB at 20,480 tokens. The engine keeps 8.2 GB a GPU.
# Host of the node: masters and moments 394 GB, reference 66 GB, sleeping weights 66 GB: 526 GB. With moments in bf16
# (--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16) 394 GB.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-32B.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/models/qwen3-32B.sh"
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-32B"
   --ref-load "$MODEL_DIR/Qwen3-32B_torch_dist"
   --load "$OUTPUT_DIR/Qwen3-32B_qwench"
   --save "$OUTPUT_DIR/Qwen3-32B_qwench"
   --save-interval 20
)

PERF_ARGS=(
   --tensor-model-parallel-size 8
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 20480
)

# Optimizer state on the host: CPU Adam steps there while the next bucket is copied.
OPTIMIZER_ARGS+=(
   --optimizer-cpu-offload
   --overlap-cpu-optimizer-d2h-h2d
   --use-precision-aware-optimizer
)

SGLANG_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus-per-engine 8
   --sglang-mem-fraction-static 0.7
   --sglang-cuda-graph-bs 1 2 4 8 $(seq 16 8 256)
)

qwench train --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate \
   "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
   "${MEGATRON_ARGS[@]}" "${PERF_ARGS[@]}" "${SGLANG_ARGS[@]}" "$@"
