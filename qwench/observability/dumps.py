"""Rollouts as files of JSON lines, to look at and to train from again (--save/--load-debug-rollout-data), or to read
(--save-debug-trajectory-data).

    {"rollout_id": 7, "metrics": {...}, "run": "/data/runs/7"}   first line
    {"sample_id": 224, "group_id": 28, ...} one line for each sample, groups in order

Not a number and infinity become null.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import orjson

from qwench.errors import ConfigError
from qwench.files import fill_rollout_id, write_atomically, written
from qwench.samples import Group, Json, Rollout, Sample


def save_rollout(template: str, rollout: Rollout, *, run: str = "") -> Path:
    """Write a rollout to the path that `template` gives for its `{rollout_id}`, and return that path.

    Args:
        run: name of the run that made it.

    Raises:
        OutputError: the disk is full.
    """
    path = rollout_path(template, rollout.rollout_id, flag="--save-debug-rollout-data")
    header = {"rollout_id": rollout.rollout_id, "metrics": dict(rollout.metrics), "run": run}
    content = b"".join(_line(record) for record in (header, *(s.to_record() for s in rollout.samples)))
    with written(f"--save-debug-rollout-data {template}", path):
        write_atomically(path, content)
    return path


def save_trajectories(template: str, rollout: Rollout) -> None:
    """Write the messages of each sample to the path that `template` gives for its `{rollout_id}`.

    A generate function keeps them in `Sample.metadata["messages"]`; of other samples they are the row and the response.

    Raises:
        OutputError: the disk is full.
    """
    flag = "--save-debug-trajectory-data"
    path = rollout_path(template, rollout.rollout_id, flag=flag)
    with written(f"{flag} {template}", path):
        write_atomically(path, b"".join(_line(_trajectory(sample)) for sample in rollout.samples))


def _trajectory(sample: Sample) -> dict[str, Json]:
    """Return a sample's line, whose names are those of miles."""
    asked = sample.prompt.messages or sample.prompt.text
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    return {
        "sample_index": sample.sample_id,
        "group_index": sample.group_id,
        "status": sample.status.value,
        "reward": sample.reward,
        "prompt": sample.prompt.text,
        "messages": sample.metadata.get("messages", [*messages, {"role": "assistant", "content": sample.response}]),
    }


def load_rollout(template: str, rollout_id: int, *, subsample: float | None = None) -> Rollout:
    """Read what `save_rollout` wrote.

    Args:
        subsample: share of the groups to keep, evenly spread and at least one; None keeps all.

    Raises:
        ConfigError: the file is missing or is not a saved rollout, or the share is not in (0, 1].
    """
    path = rollout_path(template, rollout_id, flag="--load-debug-rollout-data")
    if not path.is_file():
        raise ConfigError(f"--load-debug-rollout-data: {path} does not exist; write it with --save-debug-rollout-data first.")
    try:
        header, *records = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        samples = [Sample.from_record(record) for record in records]
        groups = [Group(group_id=i, samples=list(siblings)) for i, siblings in groupby(samples, key=lambda s: s.group_id)]
        rollout = Rollout(rollout_id=header["rollout_id"], groups=groups, metrics=header["metrics"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--load-debug-rollout-data: {path} is not a rollout saved by this version ({error!r}).") from error
    return rollout if subsample is None else _subsampled(rollout, subsample)


def run_of(path: Path) -> str | None:
    """Return the name of the run that wrote a rollout; None: no run says that it did."""
    try:
        with path.open("rb") as file:
            return str(orjson.loads(file.readline())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_recorded(template: str, *, num_rollout: int) -> None:
    """Check that a recorded rollout of the run exists. A resumed run needs no earlier ones.

    Raises:
        ConfigError: there is none.
    """
    paths = [rollout_path(template, rollout_id, flag="--load-debug-rollout-data") for rollout_id in range(num_rollout)]
    if not any(path.is_file() for path in paths):
        raise ConfigError(
            f"--load-debug-rollout-data: {paths[0]} does not exist, nor a later one of {num_rollout} rollouts; "
            "write them with --save-debug-rollout-data first."
        )


def rollout_path(template: str, rollout_id: int, *, flag: str) -> Path:
    """Fill `{rollout_id}` into a path template; a template without it would overwrite one rollout by the next."""
    path = fill_rollout_id(template, rollout_id, flag=flag)
    if path == template:
        raise ConfigError(f"{flag} {template!r} has no {{rollout_id}}; every rollout would have the same file. Add it.")
    return Path(path)


def _subsampled(rollout: Rollout, share: float) -> Rollout:
    if not 0 < share <= 1:
        raise ConfigError(f"--load-debug-rollout-data-subsample is a share in (0, 1], got {share}.")
    total = len(rollout.groups)
    kept = max(1, round(share * total))
    groups = [rollout.groups[i * total // kept] for i in range(kept)]
    return Rollout(rollout_id=rollout.rollout_id, groups=groups, metrics=rollout.metrics)


def _line(record: dict[str, Json]) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
