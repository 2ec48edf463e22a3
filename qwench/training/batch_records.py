"""What a rollout was learned from, as a file of JSON lines (--save-debug-train-data).

    {"rollout_id": 7, "run": "/data/runs/7"}                                            first line
    {"tokens": [...], "loss_mask": [...], "rewards": 1.0, "advantages": [...], ...}     one line for each sample

The columns are those of `RolloutBatch` that the method has; what is not a number becomes null.
"""

from __future__ import annotations

from dataclasses import fields

import orjson
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.files import write_atomically, written
from qwench.observability.dumps import rollout_path

_FLAG = "--save-debug-train-data"


def save_batch(template: str, rollout_id: int, batch: RolloutBatch, *, run: str) -> None:
    """Write a batch to the path that `template` gives for its `{rollout_id}`.

    Raises:
        OutputError: the disk is full.
    """
    path = rollout_path(template, rollout_id, flag=_FLAG)
    columns = {column.name: value for column in fields(batch) if (value := getattr(batch, column.name)) is not None}
    columns = {
        name: value.tolist() if isinstance(value, Tensor) else [one.tolist() for one in value]
        for name, value in columns.items()
    }
    samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lines = [
        orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in ({"rollout_id": rollout_id, "run": run}, *samples)
    ]
    with written(f"{_FLAG} {template}", path):
        write_atomically(path, b"".join(lines))
