"""`qwench train`: reinforcement learning, or fine-tuning with --loss-type sft_loss as slime's SFT recipe asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from qwench.commands.start import prepare, with_local_inputs
from qwench.config import Config
from qwench.config.command_line.parse import parse_train


def run(words: Sequence[str], *, parse: Callable[[Sequence[str]], Config] = parse_train) -> None:
    """Build the run and train; with --debug-rollout-only, generate alone."""
    config = with_local_inputs(parse(words))
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
