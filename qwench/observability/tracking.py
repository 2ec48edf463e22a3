"""Sinks of the metric log that keep it: metrics.jsonl, TensorBoard, Weights & Biases.

A line of metrics.jsonl is {"<axis>": step, "<metric>": value, ...}; null is a value that is not finite.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwench.errors import ConfigError
from qwench.files import write_atomically
from qwench.observability.metrics import Axis, Record

METRICS = "metrics.jsonl"
_logger = logging.getLogger(__name__)


class JsonlSink:
    """Append records to a file of JSON lines; a resumed run replaces those it repeats."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Append one line for each record, on the disk when this returns."""
        self._file.write("".join(_json_line(record) for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def drop_from(self, first_steps: Mapping[Axis, int]) -> None:
        """Rewrite the file without the records at or after `first_steps`, and without a line cut off by a kill."""
        records = list(_read_records(self._path))
        kept = [line for line, record in records if _is_before(record, first_steps)]
        if first_steps.get(Axis.ROLLOUT, 0) > 0 and not kept:
            _logger.warning(
                "%s has no record of the %d rollouts before: it was deleted or emptied, or another folder has it; "
                "its history begins here",
                self._path,
                first_steps[Axis.ROLLOUT],
            )
        elif not first_steps.get(Axis.ROLLOUT, 0) and records:
            _logger.warning("%s: %d records of an earlier run are replaced", self._path, len(records))
        self._file.close()
        write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _json_line(record: Record) -> str:
    values = {name: value if math.isfinite(value) else None for name, value in record.metrics.items()}
    return json.dumps({record.axis.value: record.step, **values}) + "\n"


def check_metrics_file(path: Path) -> None:
    """Check that a run may append to a file: it is missing, or holds metrics.

    Raises:
        ConfigError: it holds something else; nothing of it is changed.
    """
    for _ in _read_records(path):
        pass


def _read_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:  # values as JSON has them
    """Yield each line with its record. Only the last line can be cut off: earlier ones were followed by a whole write."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            text = line.decode()
        except ValueError:
            record, text = None, ""
        if isinstance(record, dict):
            yield text, record
        elif number < len(lines) or not line.startswith((b"{", b"\0")):
            raise ConfigError(
                f"{path} line {number} is not a record of metrics; the file is damaged or of another program. Move it away, or "
                "give another --log-dir."
            )


def _is_before(record: Mapping[str, Any], first_steps: Mapping[Axis, int]) -> bool:
    return all(record[axis.value] < first for axis, first in first_steps.items() if axis.value in record)


class TensorBoardSink:
    """Write scalars for TensorBoard, one sub-folder (TensorBoard: run) for each axis so that each resumes at its own step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first_steps: dict[Axis, int] = {}
        self._make_writer = import_tensorboard().SummaryWriter
        self._writers: dict[Axis, Any] = {}  # torch.utils.tensorboard.SummaryWriter, of an optional dependency

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Add every metric as a scalar at the record's step."""
        for record in records:
            writer = self._writer(record.axis)
            for name, value in record.metrics.items():
                writer.add_scalar(name, value, global_step=record.step)
            writer.flush()

    def drop_from(self, first_steps: Mapping[Axis, int]) -> None:
        """Tell TensorBoard to hide what was written at or after these steps."""
        self.close()
        self._first_steps = dict(first_steps)

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, axis: Axis) -> Any:
        if axis not in self._writers:
            name = axis.value.partition("/")[0]
            self._writers[axis] = self._make_writer(str(self._folder / name), purge_step=self._first_steps.get(axis))
        return self._writers[axis]


class WandbSink:
    """Send records to Weights & Biases; `run_id` makes a restarted command continue the same run."""

    def __init__(
        self,
        *,
        project: str | None,
        group: str | None = None,
        name: str | None = None,
        team: str | None = None,
        mode: str | None = None,
        folder: Path | None = None,
        run_id: str | None = None,
        host: str | None = None,
        key: str | None = None,
        run_config: Mapping[str, object] | None = None,
    ) -> None:
        wandb = import_wandb()
        if key is not None:
            wandb.login(key=key, host=host)
        self._run = wandb.init(
            project=project,
            group=group,
            name=name,
            entity=team,
            mode=mode,
            dir=str(folder) if folder is not None else None,
            id=run_id,
            resume="allow" if run_id is not None else None,
            config=dict(run_config or {}),
        )
        for axis in Axis:
            self._run.define_metric(axis.value)
        for pattern, axis in (("*", Axis.ROLLOUT), ("train/*", Axis.TRAIN), ("eval/*", Axis.EVAL)):
            self._run.define_metric(pattern, step_metric=axis.value)

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Log each record together with its own x value."""
        for record in records:
            self._run.log({record.axis.value: record.step, **record.metrics})

    def drop_from(self, first_steps: Mapping[Axis, int]) -> None:
        """Keep what was sent: the service cannot take it back, and draws the repeated points over the old ones."""

    def close(self) -> None:
        """Upload what is left and end the run."""
        self._run.finish()


def import_wandb() -> Any:  # the module object of an optional dependency
    """Return the package wandb.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    return _import("wandb", flag="--use-wandb", install="pip install wandb")


def import_tensorboard() -> Any:  # as above
    """Return PyTorch's module of TensorBoard.

    Raises:
        ConfigError: TensorBoard is not installed, or cannot be imported.
    """
    return _import("torch.utils.tensorboard", flag="--use-tensorboard", install="pip install 'qwench[tensorboard]'")


def _import(name: str, *, flag: str, install: str) -> Any:
    package = name.rpartition(".")[2]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ConfigError(f"{flag} needs the package {package}, which is not installed; run `{install}`.") from error
        raise ConfigError(f"{flag}: {package} cannot be imported ({error}); repair it with `{install}`.") from error
