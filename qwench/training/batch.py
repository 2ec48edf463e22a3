"""Packing: response-aligned columns of samples into label-aligned columns of a micro-batch, and back.

A sample of prompt `p0 p1` and response `r0 r1 r2` becomes, in a micro-batch,

    tokens     p0 p1 r0 r1 r2
    labels     p1 r0 r1 r2 --
    loss_mask   0  1  1  1  0        label-aligned: position t predicts labels[t]

Only `pack` and its inverse `unpack` convert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import orjson
import torch
from torch import Tensor

from qwench.algorithms.columns import MicroBatch, RolloutBatch
from qwench.files import write_atomically, written
from qwench.observability.dumps import rollout_path

_PACKED_COLUMNS = (
    *("loss_mask", "loss_weights", "rollout_log_probs", "old_log_probs", "old_entropy", "ref_log_probs", "advantages"),
    *("values", "returns", "support_counts"),
    *("loss_scale", "importance_scale", "picked", "fresh_scale", "stale_scale", "step_share"),
)


def pack(batch: RolloutBatch, indices: Sequence[int]) -> MicroBatch:
    """Lay the samples at `indices` back to back and shift their response columns onto the positions that predict them."""
    tokens = [batch.tokens[i] for i in indices]
    lengths = [len(t) for t in tokens]
    columns = {
        name: torch.cat([_label_aligned(column[i], lengths[k]) for k, i in enumerate(indices)])
        for name in _PACKED_COLUMNS
        if (column := getattr(batch, name)) is not None
    }
    return MicroBatch(
        tokens=torch.cat(tokens),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        labels=torch.cat([torch.cat([t[1:], t.new_zeros(1)]) for t in tokens]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        response_lengths=tuple(len(batch.loss_mask[i]) for i in indices),
        indices=tuple(indices),
        support_ids=None if batch.support_ids is None else torch.cat([batch.support_ids[i] for i in indices]),
        **columns,
    )


def idle(batch: RolloutBatch) -> MicroBatch:
    """Make a micro-batch of weight zero, with the columns of `batch`, for a rank that has to join a forward without work."""
    nothing = torch.zeros(0)
    columns = {name: [nothing] for name in _PACKED_COLUMNS if getattr(batch, name) is not None}
    columns["loss_mask"] = [nothing.bool()]
    if batch.support_ids is not None:
        columns["support_ids"] = [nothing.int()]
    two_tokens = batch.select([0]).with_columns(tokens=[batch.tokens[0][:2]], **columns)
    return replace(pack(two_tokens, [0]), response_lengths=(1,), indices=())


def unpack(values: Tensor, micro_batch: MicroBatch, response_lengths: Sequence[int]) -> list[Tensor]:
    """Cut a packed, label-aligned [T] column back into S response-aligned [R] ones; the inverse of `pack`'s shift."""
    ends = micro_batch.cu_seqlens[1:].tolist()
    return [values[end - 1 - length : end - 1] for end, length in zip(ends, response_lengths, strict=True)]


def _label_aligned(column: Tensor, length: int) -> Tensor:
    """Place [R] response values where they are predicted: one position before each response token."""
    aligned = column.new_zeros(length)
    aligned[length - 1 - len(column) : length - 1] = column
    return aligned


_FLAG = "--save-debug-train-data"


def save_batch(template: str, rollout_id: int, batch: RolloutBatch, *, run: str) -> None:
    """Write what a rollout was learned from to the path that `template` gives for its `{rollout_id}`.

        {"rollout_id": 7, "run": "/data/runs/7"}                                            first line
        {"tokens": [...], "loss_mask": [...], "rewards": 1.0, "advantages": [...], ...}     one line for each sample

    The columns are those of `RolloutBatch` that the method has. A value that is not a number becomes null.

    Raises:
        OutputError: the disk is full.
    """
    path = rollout_path(template, rollout_id, flag=_FLAG)
    columns = {column.name: value for column in fields(batch) if (value := getattr(batch, column.name)) is not None}
    columns = {
        name: value.tolist() if isinstance(value, Tensor) else [one.tolist() for one in value]
        for name, value in columns.items()
    }
    samples = [{name: values[i] for name, values in columns.items()} for i in range(len(batch.tokens))]
    lines = [
        orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in ({"rollout_id": rollout_id, "run": run}, *samples)
    ]
    with written(f"{_FLAG} {template}", path):
        write_atomically(path, b"".join(lines))
