"""Runs of generation or training alone, and recorded rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_fraction, check_not_negative, check_path_template, check_positive
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


ProfileTarget = Literal["train_overall", "train_actor", "train_log_probs"]
OVERALL: ProfileTarget = "train_overall"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilingConfig:
    """PyTorch's profiler, and its record of GPU memory."""

    use_pytorch_profiler: bool = False
    """Trace training with PyTorch's profiler. Files for TensorBoard and Perfetto go to --tensorboard-dir, or to the folder
    profile in --log-dir or --save."""
    profile_target: tuple[ProfileTarget, ...] = (OVERALL,)
    """What is traced. train_overall: a rollout's whole training. train_actor: its forward and backward passes and steps.
    train_log_probs: its passes without gradient."""
    profile_step_start: int = 10
    """Number of the first traced rollout of this start, counted from 0."""
    profile_step_end: int = 12
    """Number of the first rollout after the traced ones."""
    profile_ranks: tuple[int, ...] = (0,)
    """Trainer ranks that are traced."""
    pytorch_profiler_collect_shapes: bool = False
    """Record the shapes of tensors in traces."""
    pytorch_profiler_collect_callstack: bool = False
    """Record Python's call stacks in traces. Slower."""
    record_memory_history: bool = False
    """Record every allocation on the GPUs of --profile-ranks. A file for pytorch.org/memory_viz is written after
    --memory-snapshot-num-steps rollouts, and when memory runs out."""
    memory_snapshot_dir: Path = Path()
    """Folder of the files of --record-memory-history."""
    memory_snapshot_path: Path = Path("snapshot.pickle")
    """End of the name of these files, which begins with the rank."""
    memory_snapshot_num_steps: int | None = None
    """Write and end the record after so many rollouts of this start. None: only when memory runs out."""

    def __post_init__(self) -> None:
        check_not_negative("--profile-step-start", self.profile_step_start)
        check_positive("--memory-snapshot-num-steps", self.memory_snapshot_num_steps)
        if not self.profile_step_start < self.profile_step_end:
            raise ConfigError(
                f"--profile-step-start ({self.profile_step_start}) must be less than --profile-step-end "
                f"({self.profile_step_end}): the rollouts between them are traced"
            )
        if OVERALL in self.profile_target and len(self.profile_target) > 1:
            raise ConfigError("--profile-target train_overall traces the other targets, too; give it alone, or the others")
        if str(self.memory_snapshot_path) != self.memory_snapshot_path.name:
            raise ConfigError(
                f"--memory-snapshot-path {self.memory_snapshot_path} must be the name of a file, whose folder is "
                "--memory-snapshot-dir"
            )
