#!/usr/bin/env bash
# Supervised fine-tuning of Qwen3-4B-Base on openhermes2_5.parquet, one node of 8 GPUs: 8 data-parallel Megatron ranks.
# Memory of a rank (4.0e9): weights 8.0 GB bf16, gradients 16.1 GB fp32, optimizer 12 bytes / 8 ranks 6.0 GB; with
# recomputation 184 kB of activations a token (36 layers x 2560 x 2 bytes), 1.7 GB at 9,216 tokens.
# Usage: MODEL_DIR=... DATA_DIR=... [OUTPUT_DIR=runs] bash scripts/run-qwen3-4B-base-sft.sh [more flags]
set -euo pipefail
HERE=$(dirname "${BASH_SOURCE[0]}")
source "$HERE/models/qwen3-4B.sh"
: "${MODEL_DIR:?set it to the folder of the checkpoints}" "${DATA_DIR:?set it to the folder of the data sets}" "${OUTPUT_DIR:=runs}"

CKPT_ARGS=(
   --hf-checkpoint "$MODEL_DIR/Qwen3-4B-Base"
   --ref-load "$MODEL_DIR/Qwen3-4B-Base_torch_dist"
   --load "$OUTPUT_DIR/Qwen3-4B-Base_sft"
   --save "$OUTPUT_DIR/Qwen3-4B-Base_sft"
   --save-interval 1000
)

SFT_ARGS=(
   --rollout-function-path slime.rollout.sft_rollout.generate_rollout
   --prompt-data "$DATA_DIR/openhermes2_5.parquet"
   --input-key messages
   --rollout-shuffle
   --num-epoch 3
   --rollout-batch-size 128
   --global-batch-size 128
   --loss-type sft_loss
   --calculate-per-token-loss
   --disable-compute-advantages-and-returns
   --debug-train-only
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-5
   --lr-decay-style cosine
   --min-lr 1e-6
   --lr-warmup-fraction 0.1
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.95
)

PERF_ARGS=(
   --train-backend megatron
   --tensor-model-parallel-size 1
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1
   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
   --attention-dropout 0.0
   --hidden-dropout 0.0
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   --attention-backend flash
)

qwench sft --actor-num-nodes 1 --actor-num-gpus-per-node 8 \
   "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${SFT_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${PERF_ARGS[@]}" "$@"
