#!/usr/bin/env bash
# Three GRPO rollouts of Qwen3-0.6B's real size on one GPU: 32 prompts x 8 samples of gsm8k, 1,024 new tokens forced, trainer and
# engine colocated. With random weights (the default) it measures. With MODEL_DIR, here the folder of one checkpoint, it trains.
# DATA_DIR holds gsm8k-train.jsonl, whose rows examples/smollm2_gsm8k/README.md describes. QWEN_TIKTOKEN is for random weights
# alone. ATTENTION is cudnn where nvidia-cudnn-frontend is installed, else varlen.
# Usage: DATA_DIR=... QWEN_TIKTOKEN=.../qwen.tiktoken OUTPUT_DIR=runs/0.6b bash examples/qwen3_0.6b_one_gpu/run.sh [more flags]
set -euo pipefail
: "${DATA_DIR:?set it to the folder of gsm8k-train.jsonl}"
OUTPUT_DIR=${OUTPUT_DIR:-runs/qwen3-0.6b}
ATTENTION=${ATTENTION:-$(python -c 'from importlib.util import find_spec; print("cudnn" if find_spec("cudnn") else "varlen")')}
if [ -z "${MODEL_DIR:-}" ]; then
    : "${QWEN_TIKTOKEN:?set it to the tiktoken file of the Qwen tokenizer, or set MODEL_DIR to a checkpoint}"
    MODEL_DIR=$OUTPUT_DIR/random-0.6B
    [ -d "$MODEL_DIR" ] || qwench make-model --size 0.6B --tokenizer qwen --qwen-tiktoken "$QWEN_TIKTOKEN" --output "$MODEL_DIR"
fi

qwench train --hf-checkpoint "$MODEL_DIR" --prompt-data "$DATA_DIR/gsm8k-train.jsonl" \
    --input-key prompt --label-key label --apply-chat-template --rollout-shuffle --rm-type math --allow-degenerate-rewards \
    --num-rollout 3 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256 \
    --rollout-max-response-len 1024 --rollout-ignore-eos --rollout-temperature 1.0 \
    --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl \
    --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98 \
    --use-dynamic-batch-size --max-tokens-per-gpu 16384 --attn-implementation "$ATTENTION" \
    --colocate --no-offload-train --save "$OUTPUT_DIR/run" "$@"
