"""Checkpoint tensors by rectangles: what is written in any cut is read in any other."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException

from qwench.checkpoints.formats.pieces import Piece, PiecedTensor, rectangles


def test_a_flat_range_is_the_end_of_a_row_whole_rows_and_the_beginning_of_a_row() -> None:
    assert list(rectangles((4, 6), 4, 15)) == [((0, 4), (1, 2), 4), ((1, 0), (1, 6), 6), ((2, 0), (1, 3), 12)]


@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=2), data=st.data())
def test_rectangles_hold_each_element_of_the_range_once_and_in_order(shape: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    numbers = torch.arange(prod(shape)).view(shape)
    held: list[int] = []
    for offsets, sizes, at in rectangles(shape, start, stop):
        region = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        assert numbers[region].flatten()[0] == at
        held += numbers[region].flatten().tolist()
    assert held == list(range(start, stop))
    assert len(list(rectangles(shape, start, stop))) <= 3


def _pieces(values: Tensor, cuts: list[int]) -> list[Piece]:
    """Cut a matrix at flat positions."""
    flat = values.reshape(-1)
    return [
        Piece(offsets=offsets, values=flat[at : at + prod(sizes)].view(sizes))
        for start, stop in pairwise(cuts)
        for offsets, sizes, at in rectangles(values.shape, start, stop)
    ]


@pytest.mark.parametrize("cuts", [[0, 24], [0, 4, 15, 24], [0, 12, 24]])
def test_what_is_written_in_pieces_is_read_in_other_pieces_and_whole(tmp_path: Path, cuts: list[int]) -> None:
    values = torch.randn(4, 6)
    written = PiecedTensor((4, 6), values.dtype, _pieces(values, [0, 7, 9, 24]))
    dcp.save({"key": written}, checkpoint_id=tmp_path, no_dist=True, planner=DefaultSavePlanner(flatten_state_dict=False))
    cut, whole = torch.zeros(4, 6), torch.zeros(4, 6)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(
        {"key": PiecedTensor((4, 6), cut.dtype, _pieces(cut, cuts))}, checkpoint_id=tmp_path, no_dist=True, planner=planner
    )
    dcp.load({"key": whole}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(cut, values)
    assert torch.equal(whole, values)


def test_elements_that_nobody_asks_for_stay_as_they_are(tmp_path: Path) -> None:
    dcp.save({"key": torch.ones(4, 6)}, checkpoint_id=tmp_path, no_dist=True)
    target = torch.zeros(4, 6)
    [piece] = _pieces(target, [6, 18])
    dcp.load({"key": PiecedTensor((4, 6), target.dtype, [piece])}, checkpoint_id=tmp_path, no_dist=True)
    assert target.sum(1).tolist() == [0, 6, 6, 0]


def test_another_shape_is_refused(tmp_path: Path) -> None:
    dcp.save({"key": torch.ones(4, 6)}, checkpoint_id=tmp_path, no_dist=True)
    piece = Piece(offsets=(0, 0), values=torch.zeros(4, 5))
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load({"key": PiecedTensor((4, 5), torch.float32, [piece])}, checkpoint_id=tmp_path, no_dist=True)
