"""What verbs do with a parsed configuration before they start: warn, set the environment, plan, and show a dry run."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.text import Text

from qwench.config import Config, RunPlan
from qwench.config.advice import plan_warnings, warnings
from qwench.config.environment import trainer_environment
from qwench.config.plan import plan_lines
from qwench.config.report import settings_by_section


def prepare(config: Config, *, trains: bool = True) -> RunPlan:
    """Plan the run; print warnings, and with --dry-run the whole configuration.

    The environment is written here only, before PyTorch is imported.

    Raises:
        ConfigError: the flags do not fit the model or each other.
    """
    for warning in warnings(config, trains=trains):
        sys.stderr.write(f"qwench: warning: {warning}\n")
    if not config.debug.dry_run:
        os.environ.update(trainer_environment(config.cluster, config.parallel, config.training, os.environ))
    from qwench.launch.inputs import plan_inputs  # PyTorch reads the environment when it is imported

    plan = plan_inputs(config, trains=trains)
    for warning in plan_warnings(config, plan):
        sys.stderr.write(f"qwench: warning: {warning}\n")
    if config.debug.dry_run:
        _show(config, plan)
    return plan


def _show(config: Config, plan: RunPlan) -> None:
    console = Console(soft_wrap=True)
    for section, settings in settings_by_section(config).items():
        console.print(Text(section, style="bold"))
        for setting in settings:
            style = "dim" if setting.is_default else "green"
            console.print(Text(f"  {setting.flag} {setting.value}", style=style))
    console.print(Text("plan", style="bold"))
    for line in plan_lines(config, plan):
        console.print(Text(f"  {line}"))
