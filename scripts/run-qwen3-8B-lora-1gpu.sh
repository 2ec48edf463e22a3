#!/usr/bin/env bash
# GRPO of Qwen3-8B with LoRA on one GPU of 80 GB: one process, the embedded engine beside the trainer (docs/lora.md).
# Memory: 8.2e9 frozen parameters in bfloat16 15.3 GiB; adapters of rank 32 at all projections are 87e6 parameters, with masters,
# gradients and moments 16 bytes each 1.3 GiB; the engine's own merged weights 15.3 GiB: 31.9 GiB together. The rest is the KV
# cache (147 kB a token) while the engine generates, and activations while the trainer learns: with recomputation 295 kB a token
# (36 layers x 4096 x 2 bytes), 2.53 GiB at 9,216 tokens, and 4.6 GiB of logits (4,096 tokens at a time, and their gradient).
# Full training takes 16 bytes a parameter, 122 GiB.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-8B-lora-1gpu.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-8B"
   --load "$OUTPUT_DIR/Qwen3-8B_lora"
   --save "$OUTPUT_DIR/Qwen3-8B_lora"
   --save-interval 20
)

LORA_ARGS=(
   --lora-rank 32
   --lora-alpha 32
   --target-modules all-linear
   --lr 2e-5
   --weight-decay 0.0
)

FSDP_ARGS=(
   --train-backend fsdp
   --attn-implementation varlen
   --gradient-checkpointing
   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
)

# The trainer's 16.6 GiB stay on the GPU while the engine generates: they fit, and moving them would take seconds.
ENGINE_ARGS=(
   --rollout-engine embedded
   --embedded-mem-fraction 0.85
   --no-offload-train
)

qwench train --actor-num-nodes 1 --actor-num-gpus-per-node 1 --colocate \
   "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
   "${LORA_ARGS[@]}" "${FSDP_ARGS[@]}" "${ENGINE_ARGS[@]}" "$@"
