"""Running one half of the system, and recording what passes between them."""

from __future__ import annotations

from dataclasses import dataclass

from qwench.config.limits import check_fraction
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """Recorded rollouts and partial runs."""

    debug_rollout_only: bool = False
    """Only generate and grade; no trainer."""
    debug_train_only: bool = False
    """Only train, without an engine: on --load-debug-rollout-data, or on conversations (--loss-type sft_loss)."""
    save_debug_rollout_data: str | None = None
    """Record every rollout in this file, in which {rollout_id} is replaced."""
    load_debug_rollout_data: str | None = None
    """Train on rollouts recorded in this file, in which {rollout_id} is replaced; no engine is made."""
    load_debug_rollout_data_subsample: float | None = None
    """Use this share of a recorded rollout. None: all."""
    dry_run: bool = False
    """Print the resolved configuration and end."""

    def __post_init__(self) -> None:
        check_fraction("--load-debug-rollout-data-subsample", self.load_debug_rollout_data_subsample)
        if self.debug_rollout_only and (self.debug_train_only or self.load_debug_rollout_data):
            raise ConfigError(
                "--debug-rollout-only leaves no trainer; it excludes --debug-train-only and --load-debug-rollout-data"
            )
        for flag, template in (
            ("--save-debug-rollout-data", self.save_debug_rollout_data),
            ("--load-debug-rollout-data", self.load_debug_rollout_data),
        ):
            if template is not None and "{rollout_id}" not in template:
                raise ConfigError(
                    f"{flag} must contain {{rollout_id}}, got {template!r}; otherwise rollouts overwrite each other"
                )
