#!/usr/bin/env bash
# GRPO of Qwen3-4B with LoRA on one GPU of 24 GB: one process, the embedded engine in turn with the trainer (docs/lora.md).
# Memory: 4.0e9 frozen parameters in bfloat16 7.5 GiB; adapters of rank 16 at all projections are 33e6 parameters, with masters,
# gradients and moments 16 bytes each 0.5 GiB; the engine's own merged weights 7.5 GiB: 15.5 GiB together. The trainer learns
# with what is left: with recomputation 184 kB of activations a token (36 layers x 2560 x 2 bytes), 0.7 GiB at 4,096 tokens, and
# 1.2 GiB of logits (1,024 tokens at a time, and their gradient): 17.4 GiB, and a layer's own activations. While the engine
# generates, the trainer's 8.0 GiB are on the host, and 11 GiB of KV cache hold 80,000 tokens.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-4B-lora-24gb.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-4B"
   --load "$OUTPUT_DIR/Qwen3-4B_lora"
   --save "$OUTPUT_DIR/Qwen3-4B_lora"
   --save-interval 20
)

LORA_ARGS=(
   --lora-rank 16
   --lora-alpha 16
   --target-modules all-linear
   --lr 2e-5
   --weight-decay 0.0
)

# A response and its prompt fit a micro-batch.
FSDP_ARGS=(
   --train-backend fsdp
   --attn-implementation varlen
   --gradient-checkpointing
   --use-dynamic-batch-size
   --max-tokens-per-gpu 4096
   --log-probs-chunk-size 1024
   --rollout-max-response-len 3072
   --eval-max-response-len 8192
   --n-samples-per-eval-prompt 4
)

ENGINE_ARGS=(
   --rollout-engine embedded
   --embedded-mem-fraction 0.85
   --offload-train
)

qwench train --actor-num-nodes 1 --actor-num-gpus-per-node 1 --colocate \
   "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
   "${LORA_ARGS[@]}" "${FSDP_ARGS[@]}" "${ENGINE_ARGS[@]}" "$@"
