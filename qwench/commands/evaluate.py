"""`qwench eval`: score a model on evaluation sets."""

from __future__ import annotations

from collections.abc import Sequence

from qwench.commands.start import ask_functions, prepare, with_local_inputs
from qwench.config.command_line.parse import parse_run
from qwench.config.sections.lora import MERGE_FIRST
from qwench.errors import ConfigError


def run(words: Sequence[str]) -> None:
    """Evaluate the checkpoint, and print its metrics."""
    config = with_local_inputs(parse_run("eval", words, ask=ask_functions))
    if config.lora.lora_adapter_path is not None:
        raise ConfigError(f"--lora-adapter-path starts training from an adapter; {MERGE_FIRST}")
    plan = prepare(config, trains=False)
    from qwench.launch.evaluation import check, evaluate  # PyTorch: `prepare` sets its environment first

    if config.debug.dry_run:
        check(config, plan)
    else:
        evaluate(config, plan)
