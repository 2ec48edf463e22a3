"""Sinks of the metric log that keep it: metrics.jsonl, TensorBoard, Weights & Biases.

A line of metrics.jsonl is {"<axis>": step, "<metric>": value, ...}; null is a value that is not finite.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwench.errors import ConfigError, OutputError
from qwench.files import trouble, write_atomically, written
from qwench.observability.metrics import Axis, Record

METRICS = "metrics.jsonl"
_REFUSED_BY_MLFLOW = re.compile(r"[^a-zA-Z0-9_\-./\s]")
_logger = logging.getLogger(__name__)


class GrowingFile:
    """A file of records that are appended whole. Those that a full disk refuses are kept, and written with the next ones."""

    def __init__(self, path: Path, *, flag: str) -> None:
        """Name the file, which is made with the first records.

        Args:
            flag: the flag that named its folder, for messages.
        """
        self._path, self._flag = path, flag
        self._kept = b""
        self._trouble: OSError | None = None

    def append(self, content: bytes = b"") -> None:
        """Write what was kept, then `content`; it is on the disk when this returns, or kept with a warning."""
        self._kept += content
        try:
            if self._kept:
                self._write()
        except OSError as error:
            if self._trouble is None:
                _logger.warning("%s; its records are kept until there is room", self._describe(error))
            self._trouble = error
            return
        if self._trouble is not None:
            _logger.warning("%s is written to again; no record is lost", self._path)
        self._trouble, self._kept = None, b""

    def check(self) -> None:
        """Try once more to write what was kept.

        Raises:
            OutputError: the disk refuses it still.
        """
        self.append()
        if self._trouble is not None:
            raise OutputError(f"{self._describe(self._trouble)}; {len(self._kept):,} bytes of the last records are lost.")

    def _describe(self, error: OSError) -> str:
        return f"{self._flag} {self._path.parent}: {self._path.name} cannot be written to ({trouble(error, self._path)})"

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            end, rest = file.tell(), memoryview(self._kept)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


class JsonlSink:
    """Append records to a file of JSON lines; a resumed run replaces those it repeats."""

    def __init__(self, path: Path, *, flag: str = "--log-dir") -> None:
        """Name the file.

        Args:
            flag: the flag that named its folder, for messages.
        """
        self._path, self._flag = path, flag
        self._file = GrowingFile(path, flag=flag)

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Append one line for each record, on the disk when this returns."""
        self._file.append("".join(_json_line(record) for record in records).encode())

    def drop_from(self, first_steps: Mapping[Axis, int]) -> None:
        """Rewrite the file without the records at or after `first_steps`, and without a line cut off by a kill."""
        records = list(_read_records(self._path))
        kept = [line for line, record in records if _is_before(record, first_steps)]
        if first_steps[Axis.ROLLOUT] and not kept:
            _logger.warning(
                "%s has no record of the %d rollouts before: it was deleted or emptied, or another folder has it; "
                "its history begins here",
                self._path,
                first_steps[Axis.ROLLOUT],
            )
        elif not first_steps[Axis.ROLLOUT] and records:
            _logger.warning("%s: %d records of an earlier run are replaced", self._path, len(records))
        with written(f"{self._flag} {self._path.parent}", self._path):
            write_atomically(self._path, "".join(f"{line}\n" for line in kept))

    def check(self) -> None:
        """Check that every record is on the disk; see `GrowingFile.check`."""
        self._file.check()

    def close(self) -> None:
        """Write what a full disk refused before, if there is room now."""
        self._file.append()


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
        except (ValueError, RecursionError):
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
    """Write scalars for TensorBoard, one sub-folder (TensorBoard: run) for each axis so that each resumes at its own step.

    The package's own writer is not used: its thread ends, and prints a traceback, when the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        """Name the folder."""
        self._folder = folder
        self._first_steps: Mapping[Axis, int] = {}
        self._make_event = import_tensorboard().Event
        self._files: dict[Axis, GrowingFile] = {}

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Add every metric as a scalar at the record's step."""
        for record in records:
            values = [{"tag": name, "simple_value": _single(value)} for name, value in record.metrics.items()]
            event = self._make_event(wall_time=time.time(), step=record.step, summary={"value": values})
            self._file(record.axis).append(_framed(event.SerializeToString()))

    def drop_from(self, first_steps: Mapping[Axis, int]) -> None:
        """Tell TensorBoard to hide what was written at or after these steps."""
        self._first_steps = first_steps

    def check(self) -> None:
        """Check that every record is on the disk; see `GrowingFile.check`."""
        for file in self._files.values():
            file.check()

    def close(self) -> None:
        """Write what a full disk refused before, if there is room now."""
        for file in self._files.values():
            file.append()

    def _file(self, axis: Axis) -> GrowingFile:
        """Return the event file of an axis; a new one begins with its version, and from which step on it replaces others."""
        if axis not in self._files:
            name = f"events.out.tfevents.{time.time_ns():019d}.{platform.node()}.{os.getpid()}"
            self._files[axis] = file = GrowingFile(self._folder / axis.value.partition("/")[0] / name, flag="--tensorboard-dir")
            first = [self._make_event(wall_time=time.time(), file_version="brain.Event:2")]
            if axis in self._first_steps:
                start = {"status": "START"}
                first.append(self._make_event(wall_time=time.time(), step=self._first_steps[axis], session_log=start))
            file.append(b"".join(_framed(event.SerializeToString()) for event in first))
        return self._files[axis]


def _single(value: float) -> float:
    """Return a number as float32 holds it: infinity where it is too large."""
    return ctypes.c_float(value).value


def _framed(content: bytes) -> bytes:
    """Return an event as a record of TensorBoard's files: its length and its content, each with a checksum."""
    from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415  # an optional dependency

    RecordWriter(buffer := io.BytesIO()).write(content)
    return buffer.getvalue()


class _Service:
    """A program at the other end. Its first failure ends the curves there, and not the run."""

    _flag: str
    _name: str
    _failed = False

    def drop_from(self, first_steps: Mapping[Axis, int]) -> None:
        """Keep what was sent: the service cannot take it back, and draws the repeated points over the old ones."""

    def check(self) -> None:
        """Accept lost records: a warning said so, and the other sinks have them."""

    def _tell(self, call: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001 - another package's process at the other end
            self._failed = True
            _logger.warning("%s: %s gets no more metrics (%s); the run goes on", self._flag, self._name, _first_line(error))


class WandbSink(_Service):
    """Send records to Weights & Biases; `run_id` makes a restarted command continue the same run."""

    _flag, _name = "--use-wandb", "Weights & Biases"

    def __init__(
        self,
        *,
        project: str | None,
        group: str | None = None,
        team: str | None = None,
        mode: str | None = None,
        folder: Path | None = None,
        run_id: str | None = None,
        host: str | None = None,
        key: str | None = None,
        steps_per_rollout: int,
    ) -> None:
        """Start the service.

        Args:
            steps_per_rollout: what the axes of rollouts and evaluations count by.
        """
        self._steps_per_rollout = steps_per_rollout
        wandb = import_wandb()
        try:
            if key is not None:
                wandb.login(key=key, host=host)
            self._run = wandb.init(
                project=project,
                group=group,
                name=group,
                entity=team,
                mode=mode,
                dir=str(folder) if folder is not None else None,
                id=run_id,
                resume="allow" if run_id is not None else None,
            )
            for axis in Axis:
                self._run.define_metric(axis.value)
            for pattern, axis in (("*", Axis.ROLLOUT), ("train/*", Axis.TRAIN), ("eval/*", Axis.EVAL)):
                self._run.define_metric(pattern, step_metric=axis.value)
        except Exception as error:  # its errors share no base class
            raise ConfigError(
                f"--use-wandb: Weights & Biases does not start ({_first_line(error)}); check network and key, or give "
                "--wandb-mode offline."
            ) from error

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Log each record together with its own x value."""
        for record in records:
            step = record.step if record.axis is Axis.TRAIN else record.step * self._steps_per_rollout
            self._tell(partial(self._run.log, {record.axis.value: step, **record.metrics}))

    def close(self) -> None:
        """Upload what is left and end the run."""
        self._tell(self._run.finish)


class MlflowSink(_Service):
    """Send records to MLflow, each metric at the x value of its record; `run_id` makes a restarted command continue a run."""

    _flag, _name = "--use-mlflow", "MLflow"

    def __init__(self, *, uri: str | None, experiment: str, run_name: str | None, run_id: str | None) -> None:
        """Start the run. `uri` None: MLflow's own default, the environment variable MLFLOW_TRACKING_URI among it."""
        self._mlflow = import_mlflow()
        try:
            if uri is not None:
                self._mlflow.set_tracking_uri(uri)
            self._mlflow.set_experiment(experiment)
            self._mlflow.start_run(run_id=run_id, run_name=run_name)
        except Exception as error:  # its errors share no base class
            raise ConfigError(
                f"--use-mlflow: MLflow does not start ({_first_line(error)}); check --mlflow-tracking-uri and network."
            ) from error

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Log each record."""
        for record in records:
            named = {_REFUSED_BY_MLFLOW.sub("_", name): value for name, value in record.metrics.items()}
            self._tell(partial(self._mlflow.log_metrics, named, step=record.step))

    def close(self) -> None:
        """End the run."""
        self._tell(self._mlflow.end_run)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def import_wandb() -> Any:  # the module object of an optional dependency
    """Return the package wandb.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    return _import("wandb", flag="--use-wandb", install="pip install wandb")


def import_mlflow() -> Any:  # as above
    """Return the package mlflow.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    return _import("mlflow", flag="--use-mlflow", install="pip install mlflow")


def import_tensorboard() -> Any:  # as above
    """Return the module of TensorBoard's events.

    Raises:
        ConfigError: TensorBoard is not installed, or cannot be imported.
    """
    return _import("tensorboard.compat.proto.event_pb2", flag="--use-tensorboard", install="pip install 'qwench[tensorboard]'")


def _import(name: str, *, flag: str, install: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ConfigError(f"{flag} needs the package {package}, which is not installed; run `{install}`.") from error
        raise ConfigError(f"{flag}: {package} cannot be imported ({error}); repair it with `{install}`.") from error
