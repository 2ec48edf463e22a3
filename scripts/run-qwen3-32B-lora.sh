#!/usr/bin/env bash
# GRPO of Qwen3-32B with LoRA on one node of 8 GPUs of 80 GB: Megatron TP4 DP2, one SGLang engine of 8 GPUs (docs/lora.md).
# Memory of a rank: 8.2e9 of 32.8e9 frozen parameters in bfloat16 15.3 GiB; adapters of rank 32 at all projections are 268e6
# parameters, of which a rank has 122e6: in bfloat16 0.2 GiB, with float32 gradients 0.5 GiB, and half of their masters and
# moments, 12 bytes each 0.7 GiB. Together 16.6 GiB, none on the host. With recomputation 164 kB of activations a token
# (64 layers x 5120 x 2 bytes / TP4), 3.1 GiB at 20,480 tokens. The engine keeps 7.6 GiB a GPU: trainer and engine stay on the
# device together.
# Full training (run-qwen3-32B.sh) needs 490 GiB of the host for its optimizer, reference and sleeping weights.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-32B-lora.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/models/qwen3-32B.sh"
source "$HERE/grpo-dapo-math.sh"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-32B"
   --load "$OUTPUT_DIR/Qwen3-32B_lora"
   --save "$OUTPUT_DIR/Qwen3-32B_lora"
   --save-interval 20
)

LORA_ARGS=(
   --lora-rank 32
   --lora-alpha 32
   --target-modules all-linear
   --lr 2e-5
   --weight-decay 0.0
)

PERF_ARGS=(
   --tensor-model-parallel-size 4
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 20480
)

# SGLang gets merged weights. Its share of the memory leaves room for the trainer, which is not moved.
SGLANG_ARGS=(
   --rollout-engine sglang
   --rollout-num-gpus-per-engine 8
   --sglang-mem-fraction-static 0.6
   --sglang-cuda-graph-bs 1 2 4 8 $(seq 16 8 256)
   --no-offload-train
)

qwench train --actor-num-nodes 1 --actor-num-gpus-per-node 8 --colocate \
   "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" \
   "${MEGATRON_ARGS[@]}" "${LORA_ARGS[@]}" "${PERF_ARGS[@]}" "${SGLANG_ARGS[@]}" "$@"
