"""The programs of slime and miles, `train.py` and `train_async.py`, with the defaults that their scripts count on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwench.commands import train
from qwench.config.command_line.argv import split_words

_BOTH: Mapping[str, tuple[str, ...]] = {
    "actor-num-gpus-per-node": ("8",),
    "lr": ("1e-6",),
    "train-backend": ("megatron",),
}
DEFAULTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "train.py": _BOTH,
    "train_async.py": {**_BOTH, "rollouts-ahead": ("1",)},
}
"""Program -> the defaults of its flags, where `qwench train` has others."""


def defaults_of(program: str, words: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the defaults of a program for these words.

    With --lora-rank the backend follows from the layout: on data-parallel ranks FSDP2 trains the adapters, which Megatron here
    does not have.
    """
    defaults = dict(DEFAULTS[program])
    if any(flag.name == "lora-rank" and flag.values != ("0",) for flag in split_words(words)):
        del defaults["train-backend"]
    return defaults


def run_train(words: Sequence[str]) -> None:
    """Do what slime's and miles' train.py does: generate and train in turn."""
    train.run(words, more_defaults=defaults_of("train.py", words))


def run_train_async(words: Sequence[str]) -> None:
    """Do what slime's and miles' train_async.py does: generate one rollout ahead of training."""
    train.run(words, more_defaults=defaults_of("train_async.py", words))
