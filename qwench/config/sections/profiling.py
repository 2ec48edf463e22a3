"""Traces of time and memory in training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_not_negative, check_positive
from qwench.errors import ConfigError

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
    memory_snapshot_path: str = "snapshot.pickle"
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
        if Path(self.memory_snapshot_path).name != self.memory_snapshot_path:
            raise ConfigError(
                f"--memory-snapshot-path {self.memory_snapshot_path} must be the name of a file, whose folder is "
                "--memory-snapshot-dir"
            )
