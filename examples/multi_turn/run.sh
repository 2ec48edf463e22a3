#!/usr/bin/env bash
# GRPO on arithmetic where the policy may call a calculator in the middle of its response.
# Usage: MODEL_DIR=CHECKPOINT OUTPUT_DIR=runs/multi_turn bash examples/multi_turn/run.sh [more flags]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
OUTPUT_DIR=${OUTPUT_DIR:-runs/multi_turn}
if [ -z "${MODEL_DIR:-}" ]; then
    MODEL_DIR=$OUTPUT_DIR/random-tiny
    [ -d "$MODEL_DIR" ] || qwench make-model --size tiny --tokenizer tiny --output "$MODEL_DIR"
fi

PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} qwench train --hf-checkpoint "$MODEL_DIR" \
    --prompt-data "$here/problems.jsonl" --input-key prompt --label-key label --rm-type math --allow-degenerate-rewards \
    --custom-generate-function-path calculator.generate --log-multi-turn \
    --num-rollout 2 --rollout-batch-size 4 --n-samples-per-prompt 4 --global-batch-size 16 \
    --rollout-max-response-len 256 --rollout-temperature 1.0 --advantage-estimator grpo \
    --lr 1e-6 --lr-decay-style constant --save "$OUTPUT_DIR/run" "$@"
