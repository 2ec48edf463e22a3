"""Runs of generation or training alone, and recorded rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwench.config.limits import check_fraction, check_path_template, check_positive
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """Recorded rollouts and partial runs."""

    debug_rollout_only: bool = False
    """Only generate and grade rollouts; start no trainer."""
    debug_train_only: bool = False
    """Only train, without engines: on --load-debug-rollout-data, or on conversations with --loss-type sft_loss."""
    save_debug_rollout_data: str | None = None
    """File to record each rollout in. {rollout_id} in the name is replaced."""
    save_debug_train_data: str | None = None
    """File to record in what each rollout was learned from, one JSON line a sample: tokens, masks, rewards, log-probs and
    advantages. {rollout_id} in the name is replaced."""
    save_debug_trajectory_data: str | None = None
    """File to record the messages of each rollout in, one JSON line a sample: what the policy was asked, wrote and was told.
    {rollout_id} in the name is replaced."""
    load_debug_rollout_data: str | None = None
    """File of recorded rollouts to train on, without engines. {rollout_id} in the name is replaced."""
    load_debug_rollout_data_subsample: float | None = None
    """Share of each recorded rollout to use, 0 < share <= 1. None: all of it."""
    debug_exit_after_rollout: int | None = None
    """End this start after so many rollouts. --num-rollout still sets the schedule, and the same command goes on. None: go
    on to the end."""
    dry_run: bool = False
    """Check the flags against the model, print changed settings and plan, and exit."""

    def __post_init__(self) -> None:
        check_positive("--debug-exit-after-rollout", self.debug_exit_after_rollout)
        check_fraction("--load-debug-rollout-data-subsample", self.load_debug_rollout_data_subsample)
        if self.debug_rollout_only and (self.debug_train_only or self.load_debug_rollout_data):
            raise ConfigError(
                "--debug-rollout-only leaves no trainer; it excludes --debug-train-only and --load-debug-rollout-data"
            )
        first_of: dict[str, str] = {}
        for flag, named in self.records.items():
            if (other := first_of.setdefault(named, flag)) != flag:
                raise ConfigError(f"{flag} and {other} name the same files; give other ones")
        for flag, template in (*self.records.items(), ("--load-debug-rollout-data", self.load_debug_rollout_data)):
            check_path_template(flag, template)

    @property
    def records(self) -> Mapping[str, str]:
        """Return the files that rollouts are recorded in, by their flags."""
        named = (
            ("--save-debug-rollout-data", self.save_debug_rollout_data),
            ("--save-debug-train-data", self.save_debug_train_data),
            ("--save-debug-trajectory-data", self.save_debug_trajectory_data),
        )
        return {flag: template for flag, template in named if template is not None}
