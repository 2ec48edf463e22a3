"""What the help of each verb shows first: what it does, what it requires, a command to start from, and what most runs set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The first page of a verb's help."""

    summary: str = ""
    required: tuple[str, ...] = ()
    """Flags; their meaning is that of the table."""
    alternatives: Mapping[str, str] = field(default_factory=dict)
    """Required flag -> what serves instead."""
    common: tuple[str, ...] = ()
    example: str = ""
    meanings: Mapping[str, str] = field(default_factory=dict)
    """Flag -> its meaning in the words of this verb, where the table has those of reinforcement learning."""
    unread: tuple[str, ...] = ()
    """Sections without a meaning for this verb."""


_SFT_COMMON = (
    "save", "save-interval", "save-hf", "rollout-shuffle", "global-batch-size", "use-dynamic-batch-size",
    "max-tokens-per-gpu", "actor-num-gpus-per-node", "use-tensorboard", "use-wandb", "dry-run",
)  # fmt: skip
_LENGTH_OF_RUN = {"num-rollout": "Or --num-epoch."}

PAGES: Mapping[str, Page] = {
    "qwench train": Page(
        summary="Train by reinforcement learning: sample responses, grade them, learn, repeat.",
        required=("hf-checkpoint", "prompt-data", "rm-type", "lr", "num-rollout", "rollout-batch-size",
                  "rollout-max-response-len"),
        alternatives={"rm-type": "Or --custom-rm-path ./my_reward.py:score.", **_LENGTH_OF_RUN},
        common=("input-key", "label-key", "apply-chat-template", "n-samples-per-prompt", *_SFT_COMMON[:-3],
                "advantage-estimator", "eval-prompt-data", "eval-interval", "colocate", "rollout-engine", *_SFT_COMMON[-3:]),
        example="""\
qwench train --hf-checkpoint Qwen/Qwen3-0.6B \\
    --prompt-data zhuzilin/dapo-math-17k --input-key prompt \\
    --label-key label --apply-chat-template --rm-type deepscaler \\
    --num-rollout 100 --rollout-batch-size 32 --n-samples-per-prompt 8 \\
    --global-batch-size 256 --rollout-max-response-len 4096 --lr 1e-6 \\
    --colocate --save runs/first""",
    ),
    "qwench sft": Page(
        summary="Train on conversations (supervised fine-tuning).",
        required=("hf-checkpoint", "prompt-data", "lr", "num-rollout", "rollout-batch-size"),
        alternatives=_LENGTH_OF_RUN,
        common=("input-key", "lora-rank", *_SFT_COMMON),
        meanings={
            "num-rollout": "Number of batches in the run.",
            "rollout-batch-size": "Conversations per batch.",
            "save-interval": "Save a checkpoint every this many batches, and after the last.",
            "rollout-shuffle": "Shuffle the conversations in every epoch.",
            "global-batch-size": "Conversations per optimizer step; they divide a batch.",
        },
        unread=("agent", "asynchronous", "reward", "critic", "distillation", "engine"),
        example="""\
qwench sft --hf-checkpoint Qwen/Qwen3-0.6B --prompt-data chats.jsonl \\
    --num-epoch 3 --rollout-batch-size 64 --lr 1e-5 --rollout-shuffle \\
    --use-dynamic-batch-size --max-tokens-per-gpu 8192 \\
    --save runs/sft --save-hf runs/sft-hf""",
    ),
    "qwench eval": Page(
        summary="Score a model on evaluation sets.",
        required=("hf-checkpoint", "eval-prompt-data", "eval-max-response-len", "rm-type"),
        alternatives={"eval-prompt-data": "Or --eval-config.", "rm-type": "Or --custom-rm-path ./my_reward.py:score."},
        common=("input-key", "label-key", "apply-chat-template", "n-samples-per-eval-prompt", "eval-temperature", "eval-output",
                "rollout-engine", "dry-run"),
        unread=("asynchronous", "algorithm", "critic", "distillation", "lora", "optimizer", "parallel", "checkpoint",
                "profiling"),
        example="""\
qwench eval --hf-checkpoint runs/sft-hf \\
    --eval-prompt-data test test.jsonl --input-key prompt --label-key label \\
    --apply-chat-template --rm-type math --eval-max-response-len 2048 \\
    --eval-output runs/scores""",
    ),
    "qwench serve": Page(
        summary="Serve a model over the HTTP APIs of SGLang and OpenAI with the embedded engine.",
        required=("hf-checkpoint",),
        common=("host", "port", "lora", "train-dtype", "embedded-mem-fraction", "embedded-max-running-requests"),
        example="qwench serve --hf-checkpoint Qwen/Qwen3-0.6B --port 30000",
    ),
    "qwench convert": Page(
        summary="Convert a checkpoint between Hugging Face, torch_dist (Megatron), FSDP and FP8.",
        example="qwench convert --input runs/first --output qwen3-hf --to hf \\\n    --hf-checkpoint Qwen3-0.6B",
    ),
    "qwench reward check FILE": Page(
        summary="Grade a file of responses and labels, and count the reasons of the scores.",
        common=("rm-type", "custom-rm-path", "response-key", "label-key", "line", "second-grader", "second-grader-share"),
        example="qwench reward check responses.jsonl --rm-type math",
    ),
    "qwench make-model": Page(
        summary="Write a checkpoint with random weights.", example="qwench make-model --size tiny --output tiny"
    ),
    "qwench download OWNER/NAME ...": Page(
        summary="Download models and data sets of the Hugging Face hub into a folder.",
        example="qwench download Qwen/Qwen3-0.6B --output .",
    ),
    "qwench doctor": Page(summary="Check this machine: packages, GPUs, network, disk.", example="qwench doctor"),
    "qwench quickstart": Page(
        summary="Train a tiny model to do arithmetic, in minutes on a CPU.", example="qwench quickstart"
    ),
}  # fmt: skip
