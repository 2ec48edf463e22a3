"""`qwench train`: reinforcement learning, or fine-tuning with --loss-type sft_loss as slime's SFT recipe asks for it.

`qwench sft` is the same loop over conversations, without engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Literal

from qwench.commands.start import ask_functions, prepare, with_local_inputs
from qwench.config.command_line.parse import parse_run


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
