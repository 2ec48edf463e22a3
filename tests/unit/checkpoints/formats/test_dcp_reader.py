"""Tensors in chunks of any cut are read whole and in part, and files with other contents are refused."""

from __future__ import annotations

import io
import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwench.checkpoints.formats.dcp_reader import DcpFolder, _FileSlice, read_metadata
from qwench.checkpoints.formats.dcp_writer import DcpWriter, write_metadata
from qwench.errors import CheckpointError
from qwench.models.tensor_parts import Part

WHOLE = torch.arange(24).view(4, 6)


def _write(folder: Path, cuts: list[tuple[slice, slice]], *, shape: tuple[int, ...] = (4, 6)) -> DcpFolder:
    """Write the rectangles of WHOLE, every second one by another rank."""
    writers = [DcpWriter(folder, rank) for rank in (0, 1)]
    for number, cut in enumerate(cuts):
        writers[number % 2].add("a", WHOLE[cut].contiguous())
        places = tuple(side.start for side in cut)
        writers[number % 2].written[-1] = replace(writers[number % 2].written[-1], shape=shape, offsets=places)
    writers[1].add("b", torch.tensor([7.0]))
    writers[0].add_object("c", {"row": 3})
    for writer in writers:
        writer.close()
    write_metadata(folder, [writer.written for writer in writers], flat_keys=False)
    return DcpFolder(folder)


QUARTERS = [(slice(*rows), slice(*columns)) for rows in ((0, 1), (1, 4)) for columns in ((0, 4), (4, 6))]


@pytest.mark.parametrize("cuts", [QUARTERS, [(slice(0, 4), slice(0, 6))]], ids=["quarters", "whole"])
def test_any_part_of_a_tensor_is_read_from_chunks_of_any_cut(tmp_path: Path, cuts: list[tuple[slice, slice]]) -> None:
    folder = _write(tmp_path, cuts)
    assert torch.equal(folder.read("a"), WHOLE) and folder.read("a").dtype == torch.int64
    for dim, size in enumerate(WHOLE.shape):
        for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
            part = Part(start=start, stop=stop, dim=dim)
            found = folder.read("a", part=part)
            assert torch.equal(found, part.of(WHOLE)), part
    for row in range(4):
        assert torch.equal(folder.read("a", layer=row), WHOLE[row])
        assert torch.equal(folder.read("a", layer=row, part=Part(start=2, stop=5, dim=1)), WHOLE[row, 2:5])
    assert folder.read("b").tolist() == [7.0] and folder.objects == {"c"} and {*folder.tensors} == {"a", "b"}
    assert torch.load(io.BytesIO(folder.read_object("c"))) == {"row": 3}
    with pytest.raises(CheckpointError, match=rf"^d cannot be read from {tmp_path}"):
        folder.read_object("d")


def test_chunks_that_leave_a_hole_are_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = _write(tmp_path, QUARTERS[:3])
    assert torch.equal(folder.read("a", part=Part(start=0, stop=4, dim=1)), WHOLE[:, :4])
    with pytest.raises(CheckpointError, match=r"holds 18 of 24 elements of a; is it half-written"):
        folder.read("a")
    with pytest.raises(CheckpointError, match=r"holds 0 of 2 elements of a;"):
        folder.read("a", layer=3, part=Part(start=4, stop=6, dim=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: setattr(info, "transform_descriptors", ["zstd"]), r"is stored with \['zstd'\], which is not supported"),
        (lambda info: setattr(info, "offset", -1), "begins or ends before the file"),
        (lambda info: setattr(info, "length", info.length + 1), r"__1_0\.distcp is cut short; is .* whole"),
    ],
)
def test_places_that_cannot_be_read_are_refused_at_once(tmp_path: Path, change, message: str) -> None:
    _write(tmp_path, QUARTERS)
    metadata = read_metadata(tmp_path / ".metadata")
    last = max((info for info in metadata.storage_data.values() if info.relative_path[2] == "1"), key=lambda info: info.offset)
    change(last)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=message):
        DcpFolder(tmp_path)


def test_a_part_of_a_file_is_a_file() -> None:
    part = _FileSlice(io.BytesIO(b"0123456789"), 3, 4)
    assert (part.readable(), part.seekable(), part.tell()) == (True, True, 0)
    assert (part.read(3), part.tell(), part.read(9), part.read(1)) == (b"345", 3, b"6", b"")
    assert (part.seek(1), part.read(2)) == (1, b"45")
    assert (part.seek(-1, io.SEEK_CUR), part.read(1)) == (2, b"5")
    assert (part.seek(-4, io.SEEK_END), part.read(1), part.seek(9), part.read(1)) == (0, b"3", 9, b"")
