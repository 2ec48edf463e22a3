"""Traces of a rank's time and memory, from the flags of `ProfilingConfig`.

rollouts of this start    0  1 ... start ... end      each phase that is a target is traced in [start, end), a file each
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qwench.config.sections.debug import OVERALL, ProfileTarget, ProfilingConfig

_logger = logging.getLogger(__name__)
_MAX_ENTRIES = 1_000_000
"""Allocations that a record of memory holds: the last ones."""


class TrainProfiler:
    """Traces the phases of a rank's rollouts. `step` ends a rollout."""

    def __init__(self, section: ProfilingConfig, folder: Path, *, rank: int) -> None:
        """Begin the record of memory.

        Args:
            folder: of traces.
        """
        self._section, self._folder, self._rank = section, folder, rank
        self._num_done = 0
        self._reached = set[ProfileTarget]()
        is_chosen = rank in section.profile_ranks
        self._traces = section.use_pytorch_profiler and is_chosen
        self._records = section.record_memory_history and is_chosen
        if self._records:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES, stacks="all")
            torch._C._cuda_attach_out_of_memory_observer(lambda *_: self._write_snapshot())  # type: ignore[attr-defined]  # of builds for CUDA

    @contextmanager
    def phase(self, name: ProfileTarget) -> Iterator[None]:
        """Trace the block, if it is a target in this rollout."""
        section = self._section
        is_due = section.profile_step_start <= self._num_done < section.profile_step_end
        if not (self._traces and is_due and name in section.profile_target):
            yield
            return
        self._reached.add(name)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        worker = f"{name}_rank{self._rank}_{self._num_done:05d}"
        with torch.profiler.profile(
            activities=activities,
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(self._folder), worker_name=worker, use_gzip=True),
            record_shapes=section.pytorch_profiler_collect_shapes,
            with_stack=section.pytorch_profiler_collect_callstack,
            profile_memory=True,
        ):
            yield
        _logger.info("the trace of %s in rollout %d of this start is in %s", name, self._num_done, self._folder)

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Trace the block as a whole rollout, and count it."""
        with self.phase(OVERALL):
            yield
        self._num_done += 1
        if self._traces and self._num_done == self._section.profile_step_end:
            self._warn_of_unreached()
        if self._records and self._num_done == self._section.memory_snapshot_num_steps:
            self._write_snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)

    def _warn_of_unreached(self) -> None:
        for target in self._section.profile_target:
            if target not in self._reached:
                _logger.warning(
                    "--profile-target %s has written nothing: rollouts %d to %d of this start had no such pass",
                    target,
                    self._section.profile_step_start,
                    self._section.profile_step_end - 1,
                )

    def _write_snapshot(self) -> None:
        section = self._section
        section.memory_snapshot_dir.mkdir(parents=True, exist_ok=True)
        path = section.memory_snapshot_dir / f"rank{self._rank}_{section.memory_snapshot_path}"
        torch.cuda.memory._dump_snapshot(str(path))
        _logger.info("the record of GPU memory is in %s", path)
