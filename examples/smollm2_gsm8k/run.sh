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
NUM_ROLLOUT=${NUM_ROLLOUT:-113}
GRPO_LR=${GRPO_LR:-3e-5}
TEMPERATURE=${TEMPERATURE:-1}
read -ra GRPO_FLAGS <<<"${GRPO_FLAGS:-}"
ATTENTION=${ATTENTION:-varlen}

SFT_ROWS=${SFT_ROWS:-2500} # the first ones are demonstrations, the others are GRPO's
SFT_STEPS=${SFT_STEPS:-117} # 3 epochs in batches of 64
TASK=(--input-key prompt --label-key label --apply-chat-template)
HELD_OUT=(--eval-prompt-data gsm8k "$DATA_DIR/gsm8k-test.jsonl" --eval-max-response-len 300)
GREEDY=(--eval-temperature 0)
# Eight answers to each problem halve the standard error of one.
SAMPLED=(--eval-temperature 1 --n-samples-per-eval-prompt 8 --log-passrate)
# Decoding a model of this size is bound by launches, not by bandwidth: all 2,048 responses of a rollout run at once.
ENGINE=(--colocate --embedded-max-running-requests 2048 --sglang-server-concurrency 2048 --embedded-kv-cache-tokens 720896)
TRAINER=(--attn-implementation "$ATTENTION" --use-dynamic-batch-size --max-tokens-per-gpu 32768 --rollout-shuffle)

convert() {
    [ -d "$MODEL_DIR" ] || python "$HERE/convert.py" "$GGUF" "$MODEL_DIR"
}

evaluate() { # checkpoint, name
    local common=(--hf-checkpoint "$1" "${HELD_OUT[@]}" "${TASK[@]}" --rm-type math "${ENGINE[@]}")
    qwench eval "${common[@]}" "${GREEDY[@]}" --eval-output "$OUTPUT_DIR/eval-$2-greedy"
    qwench eval "${common[@]}" "${SAMPLED[@]}" --eval-output "$OUTPUT_DIR/eval-$2-sampled"
}

sft() {
    qwench sft --hf-checkpoint "$MODEL_DIR" --prompt-data "$DATA_DIR/gsm8k-sft.parquet@[0:$SFT_ROWS]" --input-key messages \
        --num-rollout "$SFT_STEPS" --rollout-batch-size 64 --global-batch-size 64 --calculate-per-token-loss \
        --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.05 \
        --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 \
        --save "$OUTPUT_DIR/sft" --save-interval "$SFT_STEPS" --save-hf "$OUTPUT_DIR/sft-hf" "${TRAINER[@]}"
}

# No KL term: the reward is exact, and the run is too short to need an anchor. Clip-higher keeps rare good answers learnable. The rate is
# constant for 80 of 113 rollouts, then falls. Test problems have no steps, so that the reward is 1 for a right answer there.
grpo() {
    local steps=$((2 * NUM_ROLLOUT))
    qwench train --hf-checkpoint "$OUTPUT_DIR/sft-hf" --prompt-data "$DATA_DIR/gsm8k-train.jsonl@[$SFT_ROWS:7473]" "${TASK[@]}" \
        --custom-rm-path "$HERE/steps_reward.py:score" --reward-num-workers 4 --rollout-max-response-len 240 \
        --num-rollout "$NUM_ROLLOUT" --rollout-batch-size 256 --n-samples-per-prompt 8 --global-batch-size 1024 \
        --rollout-temperature "$TEMPERATURE" --advantage-estimator grpo --disable-grpo-std-normalization \
        --eps-clip 0.2 --eps-clip-high 0.28 --calculate-per-token-loss \
        --lr "$GRPO_LR" --min-lr 1e-6 --lr-warmup-iters $((steps * 3 / 113)) --lr-decay-style WSD --lr-wsd-decay-style linear \
        --lr-wsd-decay-iters $((steps * 33 / 113)) --weight-decay 0.0 --adam-beta1 0.9 --adam-beta2 0.98 \
        "${ENGINE[@]}" --no-offload-train --no-offload-rollout "${HELD_OUT[@]}" "${GREEDY[@]}" --eval-interval 20 \
        --save "$OUTPUT_DIR/grpo" --save-interval "$NUM_ROLLOUT" --save-hf "$OUTPUT_DIR/grpo-hf" "${TRAINER[@]}" "${GRPO_FLAGS[@]}"
}

eval_base() { evaluate "$MODEL_DIR" base; }
eval_sft() { evaluate "$OUTPUT_DIR/sft-hf" sft; }
eval_grpo() { evaluate "$OUTPUT_DIR/grpo-hf" grpo; }
plot() { python "$HERE/plot.py" "$OUTPUT_DIR"; }

STAGES="convert eval_base sft eval_sft grpo eval_grpo plot"
for name in ${@:-$STAGES}; do
    [[ " $STAGES " == *" $name "* ]] || { echo "run.sh: unknown stage $name; known: $STAGES" >&2; exit 2; }
done
for name in ${@:-$STAGES}; do
    started=$SECONDS
    "$name"
    echo "== $name: $((SECONDS - started)) s"
done
