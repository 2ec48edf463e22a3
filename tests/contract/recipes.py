"""The command lines of slime's Qwen3 recipes, written out as their shell scripts expand them."""

MODEL_4B = """
--swiglu --num-layers 36 --hidden-size 2560 --ffn-hidden-size 9728 --num-attention-heads 32 --group-query-attention
--num-query-groups 8 --use-rotary-position-embeddings --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
--rotary-base 1000000 --vocab-size 151936 --kv-channels 128 --qk-layernorm
"""

MODEL_32B = """
--swiglu --num-layers 64 --hidden-size 5120 --ffn-hidden-size 25600 --num-attention-heads 64 --group-query-attention
--num-query-groups 8 --use-rotary-position-embeddings --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
--rotary-base 1000000 --vocab-size 151936 --kv-channels 128 --qk-layernorm --untie-embeddings-and-output-weights
"""

ROLLOUT = """
--prompt-data /root/dapo-math-17k/dapo-math-17k.jsonl --input-key prompt --label-key label --apply-chat-template
--rollout-shuffle --rm-type deepscaler --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8
--rollout-max-response-len 8192 --rollout-temperature 1 --global-batch-size 256 --balance-data
--eval-interval 20 --eval-prompt-data aime /root/aime-2024/aime-2024.jsonl --n-samples-per-eval-prompt 16
--eval-max-response-len 16384 --eval-top-p 1
"""

GRPO = """
--advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl --entropy-coef 0.00
--eps-clip 0.2 --eps-clip-high 0.28
--optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
"""

RECOMPUTE = """
--sequence-parallel --pipeline-model-parallel-size 1 --context-parallel-size 1 --expert-model-parallel-size 1
--expert-tensor-parallel-size 1 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
--use-dynamic-batch-size
"""

MISC = """
--attention-dropout 0.0 --hidden-dropout 0.0 --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32
--attention-backend flash --actor-num-nodes 1 --actor-num-gpus-per-node 8
"""


def _checkpoints(name: str, *, save_interval: int) -> str:
    return f"""
    --hf-checkpoint /root/{name} --ref-load /root/{name}_torch_dist --load /root/{name}_slime/ --save /root/{name}_slime/
    --save-interval {save_interval}
    """


RUN_QWEN3_4B = (
    _checkpoints("Qwen3-4B", save_interval=20)
    + MODEL_4B
    + ROLLOUT
    + GRPO
    + RECOMPUTE
    + MISC
    + "--tensor-model-parallel-size 2 --max-tokens-per-gpu 9216 --colocate"
    + " --rollout-num-gpus-per-engine 2 --sglang-mem-fraction-static 0.7"
).split()

RUN_QWEN3_32B = (
    _checkpoints("Qwen3-32B", save_interval=20)
    + MODEL_32B
    + ROLLOUT
    + GRPO
    + RECOMPUTE
    + MISC
    + "--tensor-model-parallel-size 8 --max-tokens-per-gpu 20480 --colocate"
    + " --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer"
    + " --rollout-num-gpus-per-engine 8 --sglang-mem-fraction-static 0.7 --sglang-cuda-graph-bs 1 2 4 8 "
    + " ".join(str(size) for size in range(16, 257, 8))
).split()

RUN_QWEN3_4B_BASE_SFT = (
    _checkpoints("Qwen3-4B-Base", save_interval=1000)
    + MODEL_4B
    + RECOMPUTE
    + MISC
    + """
    --rollout-function-path slime.rollout.sft_rollout.generate_rollout --prompt-data /root/openhermes2_5.parquet
    --input-key messages --rollout-shuffle --num-epoch 3 --rollout-batch-size 128 --global-batch-size 128
    --loss-type sft_loss --calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only
    --tensor-model-parallel-size 1 --max-tokens-per-gpu 9216
    --optimizer adam --lr 1e-5 --lr-decay-style cosine --min-lr 1e-6 --lr-warmup-fraction 0.1 --weight-decay 0.1
    --adam-beta1 0.9 --adam-beta2 0.95
    """
).split()
