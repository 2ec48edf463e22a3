#!/usr/bin/env bash
# GRPO of Qwen3-0.6B on one node of 8 GPUs with FSDP2 over the Hugging Face module: no conversion, an SGLang engine on each GPU.
# Memory of a rank: 0.6e9 parameters, masters and moments 12 bytes / 8 ranks 0.9 GB, gradients up to 2.4 GB fp32;
# with recomputation 57 kB of activations a token (28 layers x 1024 x 2 bytes), 1.2 GB at 20,480 tokens.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-0.6B-fsdp.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-0.6B"
   --load "$OUTPUT_DIR/Qwen3-0.6B_fsdp"
   --save "$OUTPUT_DIR/Qwen3-0.6B_fsdp"
   --save-interval 20
)

FSDP_ARGS=(
   --train-backend fsdp
   --attn-implementation flash_attention_3
   --gradient-checkpointing
   --update-weight-buffer-size 536870912
   --use-dynamic-batch-size
   --max-tokens-per-gpu 20480
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
