"""The programs of slime and miles, `train.py` and `train_async.py`, with the defaults that their scripts count on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwench.commands import train

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


def run_train(words: Sequence[str]) -> None:
    """Do what slime's and miles' train.py does: generate and train in turn."""
    train.run(words, more_defaults=DEFAULTS["train.py"])


def run_train_async(words: Sequence[str]) -> None:
    """Do what slime's and miles' train_async.py does: generate one rollout ahead of training."""
    train.run(words, more_defaults=DEFAULTS["train_async.py"])
