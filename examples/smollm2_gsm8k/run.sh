#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns grade-school mathematics on one GPU: SFT, then GRPO, with the whole test set before, between, after.
# Usage: GGUF=SmolLM2-135M-Instruct.Q4_1.gguf DATA_DIR=... OUTPUT_DIR=runs/smollm2 bash examples/smollm2_gsm8k/run.sh [stages]
# MODEL_DIR names the converted checkpoint (made if absent). Stages: convert eval_base sft eval_sft grpo eval_grpo plot; all of them
# by default. GRPO_FLAGS are added to those of GRPO.
set -euo pipefail
HERE=$(dirname "$0")
: "${DATA_DIR:?set it to the folder of the three gsm8k files (README.md)}"
OUTPUT_DIR=${OUTPUT_DIR:-runs/smollm2}
MODEL_DIR=${MODEL_DIR:-$OUTPUT_DIR/base-hf}
NUM_ROLLOUT=${NUM_ROLLOUT:-55}
GRPO_LR=${GRPO_LR:-2e-5}
TEMPERATURE=${TEMPERATURE:-1}
read -ra GRPO_FLAGS <<<"${GRPO_FLAGS:-}"
ATTENTION=${ATTENTION:-varlen}

SFT_STEPS=${SFT_STEPS:-350} # 3 epochs of 7,473 demonstrations in batches of 64
TASK=(--input-key prompt --label-key label --apply-chat-template --rm-type math)
HELD_OUT=(--eval-prompt-data gsm8k "$DATA_DIR/gsm8k-test.jsonl")
GREEDY=(--eval-temperature 0)
# Eight answers to each problem halve the standard error of one.
SAMPLED=(--eval-temperature 1 --n-samples-per-eval-prompt 8 --log-passrate)
RESPONSES=(--rollout-max-response-len 300)
# Decoding a model of this size is bound by launches, not by bandwidth: all 2,048 responses of a rollout run at once.
ENGINE=(--colocate --no-offload-train --no-offload-rollout --embedded-max-running-requests 2048 --sglang-server-concurrency 2048
        --embedded-kv-cache-tokens 917504)
TRAINER=(--attn-implementation "$ATTENTION" --use-dynamic-batch-size --max-tokens-per-gpu 32768 --rollout-shuffle)

convert() {
    [ -d "$MODEL_DIR" ] || python "$HERE/convert.py" "$GGUF" "$MODEL_DIR"
}

evaluate() { # checkpoint, name
    local common=(--hf-checkpoint "$1" "${HELD_OUT[@]}" "${TASK[@]}" "${RESPONSES[@]}" "${ENGINE[@]}")
    qwench eval "${common[@]}" "${GREEDY[@]}" --eval-output "$OUTPUT_DIR/eval-$2-greedy"
    qwench eval "${common[@]}" "${SAMPLED[@]}" --eval-output "$OUTPUT_DIR/eval-$2-sampled"
}

sft() {
    qwench sft --hf-checkpoint "$MODEL_DIR" --prompt-data "$DATA_DIR/gsm8k-sft.parquet" --input-key messages \
        --num-rollout "$SFT_STEPS" --rollout-batch-size 64 --global-batch-size 64 --calculate-per-token-loss \
        --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.05 \
        --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 \
        --save "$OUTPUT_DIR/sft" --save-interval "$SFT_STEPS" --save-hf "$OUTPUT_DIR/sft-hf" "${TRAINER[@]}"
}

# No KL term: the reward is exact, and the run is too short to need an anchor. Clip-higher keeps rare good answers learnable.
grpo() {
    qwench train --hf-checkpoint "$OUTPUT_DIR/sft-hf" --prompt-data "$DATA_DIR/gsm8k-train.jsonl" "${TASK[@]}" "${RESPONSES[@]}" \
        --num-rollout "$NUM_ROLLOUT" --rollout-batch-size 128 --n-samples-per-prompt 16 --global-batch-size 1024 \
        --rollout-temperature "$TEMPERATURE" --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --calculate-per-token-loss \
        --lr "$GRPO_LR" --lr-decay-style constant --lr-warmup-iters 4 --weight-decay 0.0 --adam-beta1 0.9 --adam-beta2 0.98 \
        "${ENGINE[@]}" "${HELD_OUT[@]}" "${GREEDY[@]}" --eval-interval 10 \
        --save "$OUTPUT_DIR/grpo" --save-interval "$NUM_ROLLOUT" --save-hf "$OUTPUT_DIR/grpo-hf" "${TRAINER[@]}" "${GRPO_FLAGS[@]}"
}

eval_base() { evaluate "$MODEL_DIR" base; }
eval_sft() { evaluate "$OUTPUT_DIR/sft-hf" sft; }
eval_grpo() { evaluate "$OUTPUT_DIR/grpo-hf" grpo; }
plot() { python "$HERE/plot.py" "$OUTPUT_DIR"; }

for stage in "${@:-convert eval_base sft eval_sft grpo eval_grpo plot}"; do
    for name in $stage; do
        started=$SECONDS
        "$name"
        echo "== $name: $((SECONDS - started)) s"
    done
done
