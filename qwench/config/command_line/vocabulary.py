"""Words that users of other tools type, and what serves them here.

TRL, Hugging Face's Trainer, verl, OpenRLHF and Axolotl call the same thing by other names. Each phrase below names flags that
exist and are accepted; a test reads every one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_LENGTH = "use --rollout-max-context-len, the longest prompt and response together"
_RESPONSE = "use --rollout-max-response-len"
_MODEL = "use --hf-checkpoint, a folder or a model of the Hugging Face hub"
_DATA = "use --prompt-data, a file, a folder or a data set of the Hugging Face hub"
_EVAL_DATA = "use --eval-prompt-data NAME FILE"
_OUTPUT = "use --save for checkpoints, and --save-hf to export Hugging Face folders"
_BATCH = "use --rollout-batch-size, the prompts in a rollout, or --global-batch-size, the samples in an optimizer step"
_MICRO = "use --micro-batch-size, or --use-dynamic-batch-size with --max-tokens-per-gpu"
_EPOCHS = "use --num-epoch, the passes over the data set"
_STEPS = "use --num-rollout; a rollout has --num-steps-per-rollout optimizer steps"
_SAMPLES = "use --n-samples-per-prompt, the responses to a prompt"
_KL = "use --use-kl-loss with --kl-loss-coef"
_REWARD = "use --rm-type NAME, or --custom-rm-path ./my_reward.py:score"
_RESUME = "the same command with the same --save goes on from its last checkpoint; --load starts from another run's"
_RESTRICTED = "training samples from the whole distribution"
_LOGGING = "use --use-tensorboard, or --use-wandb with --wandb-project"
_ENGINE = "engines are Qwench's own or SGLang servers; see --rollout-engine"
_NO_GPU_FLAG = "GPUs are used where there are some; set CUDA_VISIBLE_DEVICES= to hide them"
_TENSOR = "use --tensor-model-parallel-size for the trainer, and --rollout-num-gpus-per-engine for SGLang engines"

_PHRASES: Mapping[str, str] = {
    # Optimizer.
    "learning-rate actor-lr lr-actor actor-learning-rate max-lr peak-lr step-size": "use --lr",
    "lr-scheduler lr-scheduler-type scheduler scheduler-type lr-schedule": "use --lr-decay-style",
    "warmup-steps num-warmup-steps lr-warmup-steps warmup lr-warmup warmup-iters": "use --lr-warmup-iters",
    "warmup-ratio lr-warmup-ratio lr-warmup-steps-ratio warmup-fraction": "use --lr-warmup-fraction",
    "max-grad-norm grad-clip gradient-clipping clip-grad-norm max-norm gradient-clip-val": "use --clip-grad",
    "optim optimizer-name optimizer-type muon galore lion sgd adafactor": ("use --optimizer: adam (AdamW), or muon"),
    "adam-epsilon": "use --adam-eps",
    "betas adam-betas": "use --adam-beta1 and --adam-beta2",
    "wd": "use --weight-decay",
    # Batches and length of the run.
    "batch-size train-batch-size bs batch": _BATCH,
    "per-device-train-batch-size per-device-batch-size per-gpu-train-batch-size micro-train-batch-size": _MICRO,
    "micro-rollout-batch-size rollout-micro-batch-size log-prob-micro-batch-size-per-gpu": (
        "engines batch requests themselves; --embedded-max-running-requests bounds them"
    ),
    "ppo-micro-batch-size-per-gpu micro-batch-size-per-gpu ppo-micro-batch-size": _MICRO,
    "ppo-mini-batch-size mini-batch-size generation-batch-size global-bs": "use --global-batch-size",
    "ppo-max-token-len-per-gpu max-token-len-per-gpu": "use --use-dynamic-batch-size with --max-tokens-per-gpu",
    "gradient-accumulation-steps gradient-accumulation grad-accumulation grad-accum accumulate-grad-batches": (
        "gradients accumulate over micro-batches until --global-batch-size samples are reached; set --micro-batch-size"
    ),
    "num-train-epochs num-epochs epochs epoch total-epochs n-epochs max-epochs train-epochs": _EPOCHS,
    "max-steps num-steps total-steps total-training-steps train-steps train-iters num-iterations iterations steps": _STEPS,
    "num-rollouts num-episodes": "use --num-rollout",
    "ppo-epochs update-epochs": "use --num-steps-per-rollout; each sample of a rollout is trained on once",
    "packing sample-packing packing-samples pack padding-free group-by-length use-remove-padding": (
        "use --use-dynamic-batch-size with --max-tokens-per-gpu, which packs samples"
    ),
    # Lengths and sampling.
    "max-length max-len max-seq-length seq-length seq-len sequence-len sequence-length cutoff-len": _LENGTH,
    "model-max-length max-model-len max-context-length context-length max-context-len block-size": _LENGTH,
    "max-new-tokens max-tokens max-completion-length max-completion-len max-response-length max-response-len": _RESPONSE,
    "response-length generate-max-len max-gen-len completion-length rollout-max-tokens rollout-max-new-tokens": _RESPONSE,
    "max-prompt-length max-prompt-len prompt-max-len prompt-length": "use --rollout-max-prompt-len",
    "temperature temp": "use --rollout-temperature",
    "top-p top-k": f"{_RESTRICTED}; for evaluation use --eval-top-p and --eval-top-k",
    "min-p repetition-penalty presence-penalty frequency-penalty": f"{_RESTRICTED}, without penalties",
    "num-generations num-samples n-samples samples-per-prompt num-samples-per-prompt group-size": _SAMPLES,
    "n-samples-per-group num-return-sequences n rollout-n num-generations-per-prompt generations-per-prompt": _SAMPLES,
    "opd-teacher opd-teacher-path opd-teacher-model": "use --opd-teacher-load, or --opd-teacher-urls",
    "enable-thinking thinking": "use --apply-chat-template-kwargs '{\"enable_thinking\": false}'",
    "stop stop-words stop-strings": "use --rollout-stop",
    # Model.
    "model models model-name-or-path model-path model-id model-dir base-model pretrain pretrained model.path": _MODEL,
    "pretrained-model-name-or-path hf-model hf-path hf-ckpt checkpoint actor-model policy-model load-hf": _MODEL,
    "tokenizer tokenizer-path tokenizer-name-or-path tokenizer-name": "the tokenizer is that of --hf-checkpoint",
    "ref-model reference-model ref-model-path reference-model-path": "use --ref-load",
    "model-revision": "use --hf-checkpoint OWNER/NAME@REVISION",
    "dtype precision torch-dtype mixed-precision param-dtype model-dtype amp": "use --train-dtype",
    "attn-impl flash-attn flash-attention use-flash-attn use-flash-attention-2 attention attn": ("use --attn-implementation"),
    "activation-checkpointing enable-gradient-checkpointing use-gradient-checkpointing recompute": (
        "use --gradient-checkpointing"
    ),
    "compile use-torch-compile": "use --torch-compile",
    "trust-remote-code": "code that lies in a checkpoint is never run; leave it out",
    # Data.
    "dataset datasets data dataset-name dataset-path dataset-id data-path data-files train-data train-dataset": _DATA,
    "train-file train-files train-path training-data prompt-dataset prompts input-data data-file dataset-mixer": _DATA,
    "eval-dataset eval-data eval-file eval-files val-data val-files val-file validation-data validation-file": _EVAL_DATA,
    "test-data test-file test-files valid-data valid-file val-dataset": _EVAL_DATA,
    "split dataset-split train-split dataset-train-split dataset-config subset dataset-config-name": (
        "use --prompt-data OWNER/NAME:SPLIT or OWNER/NAME:CONFIG/SPLIT"
    ),
    "max-samples max-train-samples num-train-samples limit train-max-samples": (
        "use --prompt-data 'FILE@[:1000]' for the first 1000 rows"
    ),
    "prompt-key prompt-column prompt-field input-column question-key messages-key messages-column text-column": (
        "use --input-key"
    ),
    "dataset-text-field text-field text-key": "use --input-key",
    "answer-key label-column answer-field ground-truth-key target-column response-key answer-column": "use --label-key",
    "chat-template": "the chat template is that of the tokenizer in --hf-checkpoint",
    "system-prompt": "put a system message into each row of --prompt-data",
    "train-on-inputs completion-only-loss assistant-only-loss": ("assistant turns alone are trained on; see --loss-mask-type"),
    "shuffle shuffle-data shuffle-dataset": "use --rollout-shuffle",
    "data-seed random-seed manual-seed": "use --seed for the trainer, and --rollout-seed for data and sampling",
    "num-workers dataloader-num-workers preprocessing-num-workers": (
        "rows are read once, without workers; --reward-num-workers sets the grading processes"
    ),
    # Algorithm.
    "algorithm algo adv-estimator advantage method rl-algorithm": "use --advantage-estimator",
    "kl-estimator kl-type kl-loss-estimator": "use --kl-loss-type",
    "use-kl": _KL,
    "beta kl-beta kl-ctl init-kl-coef kl-penalty-coef kl-weight kl-loss-weight kl kl-coefficient": _KL,
    "epsilon clip-range cliprange clip-ratio clip-eps clip-ratio-low clip-param epsilon-low": "use --eps-clip",
    "epsilon-high clip-ratio-high clip-high": "use --eps-clip-high",
    "clip-ratio-c dual-clip": "use --eps-clip-c",
    "entropy-coeff entropy entropy-bonus entropy-weight ent-coef entropy-coefficient entropy-loss-coef": "use --entropy-coef",
    "scale-rewards norm-adv-by-std-in-grpo": "use --disable-grpo-std-normalization to switch it off",
    "loss loss-agg-mode": "use --calculate-per-token-loss to average over tokens",
    "dynamic-filtering dynamic-sampling filter-groups filter-overlong-prompts": (
        "use --dynamic-sampling-filter-path with --over-sampling-batch-size"
    ),
    "normalize-reward normalize-rewards reward-normalization whiten-rewards whiten-advantages": (
        "advantages are relative to their group; --normalize-advantages also scales them over the batch"
    ),
    "dapo": "use --eps-clip-high, --dynamic-sampling-filter-path and --calculate-per-token-loss",
    "async one-step-off num-steps-off async-training async-train": "use --rollouts-ahead, or --fully-async",
    # Rewards.
    "rm-hub reward-manager custom-reward custom-rm-function": _REWARD,
    "reward reward-type rm verifier reward-name reward-fn reward-func reward-funcs reward-function": _REWARD,
    "reward-functions custom-reward-function reward-fn-path custom-reward-function-path reward-path": _REWARD,
    "reward-model reward-pretrain reward-model-path reward-server remote-rm-url": (
        "use --rm-type remote_rm with --rm-url, the address of a reward server"
    ),
    # Checkpoints and outputs.
    "output-dir output out out-dir save-dir save-path output-path ckpt-dir checkpoint-dir default-local-dir o": _OUTPUT,
    "ckpt-path": _OUTPUT,
    "save-steps save-freq save-every checkpoint-interval checkpoint-every save-strategy": "use --save-interval",
    "save-total-limit max-checkpoints max-ckpt-to-keep max-actor-ckpt-to-keep keep-last max-ckpt-num": "use --keep-checkpoints",
    "resume resume-from-checkpoint resume-from resume-mode load-checkpoint continue auto-resume": _RESUME,
    "metric-for-best-model load-best-model-at-end greater-is-better save-best best-model": "use --keep-best",
    "early-stopping early-stop patience": "use --early-stopping-patience, or --stop-metric 'eval/NAME>=X'",
    "push-to-hub hub-model-id hub-token": "upload what --save-hf writes with: hf upload OWNER/NAME FOLDER",
    # Evaluation and logging.
    "eval-steps test-freq eval-freq eval-every eval-strategy evaluation-strategy val-check-interval": "use --eval-interval",
    "report-to logger trackers tracker log-to log-with": _LOGGING,
    "wandb": "use --use-wandb with --wandb-project",
    "wandb-run-name run-name experiment-name exp-name wandb-name wandb-run": "use --wandb-group",
    "project project-name": "use --wandb-project",
    "wandb-entity": "use --wandb-team",
    "tensorboard": "use --use-tensorboard with --log-dir",
    "logging-dir logdir": "use --log-dir",
    "logging-steps log-interval log-every logging-strategy": "every rollout is logged; leave it out",
    "verbose debug loglevel": "use --log-level debug",
    "dry": "use --dry-run",
    # Devices.
    "num-gpus gpus n-gpus n-gpus-per-node gpus-per-node num-processes nproc-per-node num-gpus-trainer devices": (
        "use --actor-num-gpus-per-node"
    ),
    "nnodes num-nodes num-machines nodes": "use --actor-num-nodes",
    "tp tp-size tensor-parallel-size tensor-parallel vllm-tensor-parallel-size": _TENSOR,
    "pp pp-size pipeline-parallel-size pipeline-parallel": "use --pipeline-model-parallel-size",
    "cp cp-size ulysses-sequence-parallel-size sp-size": "use --context-parallel-size",
    "gpu-memory-utilization mem-fraction mem-fraction-static": "use --embedded-mem-fraction",
    "cpu-offload optimizer-offload offload-optimizer adam-offload param-offload": "use --optimizer-cpu-offload",
    "device cpu use-cpu no-cuda cuda gpu": _NO_GPU_FLAG,
    "deepspeed ds-config zero-stage zero fsdp accelerate-config": (
        "use --train-backend fsdp, which shards parameters, gradients and optimizer state"
    ),
    "backend strategy": "use --train-backend",
    "colocate-all-models colocate-actor-ref hybrid-engine share-gpus": "use --colocate",
    "ddp-timeout nccl-timeout": "use --distributed-timeout-minutes",
    "local-rank node-rank rank master-port master-addr world-size rdzv-endpoint": (
        "a run starts its ranks itself; use --actor-num-nodes and --actor-num-gpus-per-node"
    ),
    "ray-address ray-cluster": "the environment variable RAY_ADDRESS names the cluster",
    "rope-scaling rope-theta yarn-factor yarn rope-type": "trainer and engines read it from config.json of --hf-checkpoint",
    "engine inference-engine rollout-backend rollout.name": "use --rollout-engine",
    "api-key token auth-token": "the environment variable QWENCH_TOKEN sets the token of a server",
}
ADVICE: Mapping[str, str] = {name: phrase for names, phrase in _PHRASES.items() for name in names.split()}
_JOINED: Mapping[str, str] = {name.replace("-", ""): phrase for name, phrase in ADVICE.items() if "-" in name}
"""The same names without dashes: `learningrate`."""

_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"lora|peft|adapter", "--lora-rank trains adapters; see --lora-alpha, --target-modules and --lora-adapter-path"),
    (r"gguf|ggml|llama-?cpp", "GGUF is neither read nor written; llama.cpp converts the Hugging Face folders of --save-hf"),
    (r"quant|4bit|8bit|bnb|awq|gptq", "weights are not quantised in training; qwench convert --to fp8 makes FP8 checkpoints"),
    (
        r"(^|-)(dpo|kto|orpo|simpo|ipo)(-|$)",
        "Qwench has no preference optimisation; it has RL (qwench train) and SFT (qwench sft)",
    ),
    (r"vllm", _ENGINE),
    (r"deepspeed|zero-?[123]", ADVICE["deepspeed"]),
    (r"critic|value-model|vf-coef", "--advantage-estimator ppo trains a critic; see --critic-lr and --critic-load"),
    (r"image|video|audio|vision", "Qwench trains text models"),
    (r"neftune|label-smoothing|(^|-)ema(-|$)|freeze|liger|distillation-temp", "Qwench has none; leave it out"),
    (
        r"(^|-)(agent|tool|tools|mcp|multi-turn|multiturn)(-|$)",
        "conversations with tools are a function of yours: use --custom-generate-function-path",
    ),
)

_OF_VERB: Mapping[str, Mapping[str, str]] = {
    "qwench eval": {
        **dict.fromkeys(
            ("output-dir", "output", "out", "out-dir", "o", "save", "save-dir", "output-path"), "use --eval-output"
        ),
        **dict.fromkeys(("dataset", "datasets", "data", "data-path", "prompt-data", "tasks", "task"), _EVAL_DATA),
        **dict.fromkeys(("max-new-tokens", "max-tokens", "max-response-len"), "use --eval-max-response-len"),
        "temperature": "use --eval-temperature",
        "top-p": "use --eval-top-p",
        "top-k": "use --eval-top-k",
        "batch-size": "use --embedded-max-running-requests, the responses decoded at once",
        **dict.fromkeys(("n", "num-samples", "n-samples", "k"), "use --n-samples-per-eval-prompt"),
    },
    "qwench serve": {
        **dict.fromkeys(("max-num-seqs", "batch-size", "max-batch-size"), "use --embedded-max-running-requests"),
        **dict.fromkeys(("max-model-len", "max-length", "context-length"), "use --embedded-kv-cache-tokens"),
        "listen": "use --host and --port",
    },
    "qwench convert": {
        **dict.fromkeys(("source", "src", "input-dir", "input-path", "load", "from", "checkpoint", "model"), "use --input"),
        **dict.fromkeys(("output-dir", "output-path", "out", "o", "save", "dest", "target"), "use --output"),
        **dict.fromkeys(("format", "output-format", "target-format"), "use --to"),
        **dict.fromkeys(("origin-hf-dir", "config", "tokenizer"), "use --hf-checkpoint"),
    },
    "qwench reward check": {
        **dict.fromkeys(("response-column", "completion-key", "output-key", "input-key"), "use --response-key"),
        **dict.fromkeys(("workers", "num-workers", "processes"), "use --reward-num-workers"),
        "timeout": "use --reward-timeout-s",
    },
    "qwench download": {
        **dict.fromkeys(("local-dir", "dir", "cache-dir", "save", "out", "o"), "use --output"),
        **dict.fromkeys(("repo-type", "type"), "use --kind"),
        "dataset": "use --kind dataset",
    },
    "qwench make-model": {
        **dict.fromkeys(("model", "model-size", "num-layers", "hidden-size", "vocab-size"), "use --size"),
        **dict.fromkeys(("save", "output-dir", "out", "o"), "use --output"),
    },
}
"""Verb -> word -> what serves it there, before `ADVICE`."""
_FLAG = re.compile(r"--[a-z][a-z0-9-]+")


def advise(word: str, *, prog: str, offered: Iterable[str]) -> str | None:
    """Return the phrase for a word that is no flag of the verb; None: nothing is known of it.

    Args:
        word: a flag without its dashes, or the key of an override such as `actor_rollout_ref.actor.optim.lr`.
        prog: the verb as help texts show it; `qwench reward check FILE` counts as `qwench reward check`.
        offered: the flags of the verb that are accepted.
    """
    flags = set(offered)
    for name in _spellings(word):
        own = next((words for verb, words in _OF_VERB.items() if prog.startswith(verb) and name in words), None)
        phrase = own[name] if own is not None else ADVICE.get(name) or _family(name) or _JOINED.get(name.replace("-", ""))
        if phrase is None and name in flags:
            phrase = f"use --{name}"
        if phrase is not None:
            named = [flag[2:] for flag in _FLAG.findall(phrase) if "qwench" not in phrase]
            return phrase if flags.issuperset(named) else f"{phrase}; {prog} has no such flag, qwench train has"
    return None


def _spellings(word: str) -> Iterable[str]:
    """Yield the names to look up, the most specific first: `a.model.path` -> a.model.path, model.path, path."""
    parts = word.lower().lstrip("+-").replace("_", "-").split(".")
    yield from (".".join(parts[i:]) for i in range(len(parts)))
    yield ".".join(parts).removeprefix("no-")


def _family(name: str) -> str | None:
    return next((phrase for pattern, phrase in _FAMILIES if re.search(pattern, name)), None)
