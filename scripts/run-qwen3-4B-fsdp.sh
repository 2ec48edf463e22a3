#!/usr/bin/env bash
# GRPO of Qwen3-4B on one node of 8 GPUs with FSDP2 over the Hugging Face module: no conversion, an SGLang engine on each GPU.
# Memory of a rank: 4.0e9 parameters, masters and moments 12 bytes / 8 ranks 6.0 GB, gradients 4 bytes / 8 ranks 2.0 GB
# (reduced every micro-batch); with recomputation 184 kB of activations a token (36 layers x 2560 x 2 bytes), 1.7 GB at 9,216.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-4B-fsdp.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-4B"
   --load "$OUTPUT_DIR/Qwen3-4B_fsdp"
   --save "$OUTPUT_DIR/Qwen3-4B_fsdp"
   --save-interval 20
)

FSDP_ARGS=(
   --train-backend fsdp
   --attn-implementation flash_attention_3
   --gradient-checkpointing
   --update-weight-buffer-size 536870912
   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
)

SGLANG_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.7
   --sglang-attention-backend fa3
)

qwench train --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate \
   "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
   "${FSDP_ARGS[@]}" "${SGLANG_ARGS[@]}" "$@"
