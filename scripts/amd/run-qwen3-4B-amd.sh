#!/usr/bin/env bash
# GRPO of Qwen3-4B on AMD GPUs: TP2, SGLang engines of 2 GPUs, in turns on the same GPUs; as many as are visible, else NUM_GPUS.
# ROCm PyTorch calls its devices cuda, and RCCL speaks as NCCL; nothing else differs from run-qwen3-4B.sh.
# Memory of a rank, with 8 GPUs: as there.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/amd/run-qwen3-4B-amd.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")/..
source "$HERE/models/qwen3-4B.sh"
source "$HERE/grpo-dapo-math.sh"

VISIBLE=${HIP_VISIBLE_DEVICES:-${CUDA_VISIBLE_DEVICES:-}}
if [ -n "$VISIBLE" ]; then
   NUM_GPUS=$(tr "," "\n" <<< "$VISIBLE" | wc -l)
fi
: "${NUM_GPUS:=8}"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-4B"
   --ref-load "$MODEL_DIR/Qwen3-4B_torch_dist"
   --load "$OUTPUT_DIR/Qwen3-4B_amd"
   --save "$OUTPUT_DIR/Qwen3-4B_amd"
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

qwench train --actor-num-nodes 1 --actor-num-gpus-per-node "$NUM_GPUS" --num-gpus-per-node "$NUM_GPUS" --colocate \
   "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
   "${MEGATRON_ARGS[@]}" "${PERF_ARGS[@]}" "${SGLANG_ARGS[@]}" "$@"
