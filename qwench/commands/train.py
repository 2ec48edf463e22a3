"""`qwench train`: reinforcement learning, or fine-tuning with --loss-type sft_loss as slime's SFT recipe asks for it.

`qwench sft` is the same loop over conversations, without engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Literal

from qwench.commands.start import ask_functions, prepare, with_local_inputs
from qwench.config.command_line.parse import parse_run

_BOTH: Mapping[str, tuple[str, ...]] = {
    "actor-num-gpus-per-node": ("8",),
    "lr": ("1e-6",),
    "train-backend": ("megatron",),
}
SCRIPT_DEFAULTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "train.py": _BOTH,
    "train_async.py": {**_BOTH, "rollouts-ahead": ("1",)},
}
"""Program of slime and miles -> the defaults that their scripts count on, where `qwench train` has others."""


def run(
    words: Sequence[str],
    *,
    verb: Literal["train", "sft"] = "train",
    more_defaults: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """Build the run and train; with --debug-rollout-only, generate alone."""
    config = with_local_inputs(parse_run(verb, words, more_defaults=more_defaults, ask=ask_functions))
    plan = prepare(config)
    from qwench import controller  # PyTorch: `prepare` sets its environment first
    from qwench.launch.build import build, check
    from qwench.observability.log import failures_logged
    from qwench.training.process_group import leave_process_group

    if config.debug.dry_run:
        check(config, plan)
        return
    with closing(build(config, plan)) as built, failures_logged():
        if plan.devices.trains:
            controller.train(built)
        else:
            controller.generate(built)
        built.finish()
    leave_process_group()


def run_sft(words: Sequence[str]) -> None:
    """Train on conversations."""
    run(words, verb="sft")


def run_train(words: Sequence[str]) -> None:
    """Do what slime's and miles' train.py does: generate and train in turn."""
    run(words, more_defaults=SCRIPT_DEFAULTS["train.py"])


def run_train_async(words: Sequence[str]) -> None:
    """Do what slime's and miles' train_async.py does: generate one rollout ahead of training."""
    run(words, more_defaults=SCRIPT_DEFAULTS["train_async.py"])
