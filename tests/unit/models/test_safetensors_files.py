"""Safetensors written tensor by tensor are what the safetensors package writes, and are read back bit by bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwench.errors import CheckpointError
from qwench.models.safetensors_files import SafetensorsWriter, TensorSpec, find_tensors, is_equal, read_header, read_tensor
from qwench.models.tensor_parts import Part

TENSORS = {
    "b.weight": torch.arange(6).bfloat16().reshape(2, 3),
    "a.weight": torch.tensor([float("nan"), -0.0, 1e-40]).bfloat16(),
    "wide": torch.tensor([1.5]),
    "empty": torch.zeros(0, 4).bfloat16(),
}


def test_the_file_is_that_of_the_package(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    specs = {name: TensorSpec(shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in TENSORS.items()}
    with SafetensorsWriter(tmp_path / "ours", specs) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_are_read_bit_by_bit(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = find_tensors(tmp_path)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = read_tensor(found[name])
        assert read.shape == tensor.shape
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("part", [Part(start=1, stop=3), Part(start=1, stop=3, dim=1), Part(start=2, stop=2)], ids=str)
def test_a_part_is_read_bit_by_bit(tmp_path: Path, part: Part) -> None:
    tensors = {"a": torch.arange(24.0).view(4, 3, 2), "b": torch.arange(12).bfloat16().view(4, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, stored in find_tensors(tmp_path).items():
        read = read_tensor(stored, part)
        assert read.is_contiguous() and read.tolist() == part.of(tensors[name]).tolist()


def test_a_part_of_a_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    found = find_tensors(tmp_path)["a"]
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 1)
    assert read_tensor(found, Part(start=0, stop=3, dim=1)).tolist() == [[0.0] * 3] * 4, "the last column is not read"
    with pytest.raises(CheckpointError, match=r"model\.safetensors has become shorter while it was read"):
        read_tensor(found, Part(start=3, stop=4))


def test_tensors_are_equal_by_dtype_shape_and_bytes(tmp_path: Path) -> None:
    last = torch.zeros(1 << 20)
    last[-1] = 1
    save_file({"a": torch.zeros(1 << 20), "b": torch.zeros(1 << 20), "c": last}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(1 << 10, 1 << 10)}, tmp_path / "other.safetensors")
    found = read_header(tmp_path / "model.safetensors")
    other = read_header(tmp_path / "other.safetensors")["a"]
    assert is_equal(found["a"], found["b"])
    assert is_equal(found["a"], found["c"]) is False, "the last byte differs"
    assert is_equal(found["a"], other) is False
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors and .*model\.safetensors cannot be compared"):
        is_equal(found["a"], found["b"])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        read_tensor(found["a"])


def test_a_file_may_not_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path / "file", {})


WRONG_SIZE = b'{"w":{"dtype":"BF16","shape":[4],"data_offsets":[0,6]}}   '


NO_SIZES = "cannot be read as safetensors .*are no lists of sizes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"shape": shape}, NO_SIZES) for shape in ([-1], "x", [1.0], [True], None)),
        *(({"data_offsets": offsets}, NO_SIZES) for offsets in ([0], ["a", "b"], [-4, 0], "ab", [0, 2, 4])),
        ({"dtype": "F4"}, r"cannot be read as safetensors \('F4'\)"),
        ({"dtype": ["F32"]}, r"cannot be read as safetensors \(.*'F32'"),
        ({"data_offsets": [0, 8]}, r"cannot be read as safetensors \(a tensor of shape \[1\] does not have 8 bytes\)"),
        ({"shape": [10**30], "data_offsets": [0, 4 * 10**30]}, r"has \d+ bytes, but its header describes 4\d+; is it half"),
    ],
    ids=str,
)
def test_a_header_that_describes_no_tensor_is_damage(tmp_path: Path, change: dict[str, object], message: str) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **change}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors {message}"):
        read_header(tmp_path / "model.safetensors")


def test_tensors_may_not_overlap(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"b begins at byte \d+, but the tensors before it end at"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (b"\x00\x00\x00\x00\x00\x00\x00\x7f{}", "is not a safetensors file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "cannot be read"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}more", "half-written"),
        (len(WRONG_SIZE).to_bytes(8, "little") + WRONG_SIZE + b"123456", "does not have 6 bytes"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "model.safetensors")


def test_an_index_that_promises_too_much_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"c.weight": "model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"lacks c\.weight"):
        find_tensors(tmp_path)
    two = '{"weight_map": {"d.weight": "model-1.safetensors", "c.weight": "model-1.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(two)
    with pytest.raises(CheckpointError, match=r"lacks c\.weight"):
        find_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"c.weight": "model-2.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors"):
        find_tensors(tmp_path)


def test_every_dtype_is_that_of_the_package(tmp_path: Path) -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    save_file({str(dtype): torch.ones(3).to(dtype) for dtype in floats + integers}, tmp_path / "model.safetensors")
    for name, found in read_header(tmp_path / "model.safetensors").items():
        assert str(found.spec.dtype) == name
        assert read_tensor(found).double().tolist() == [1.0] * 3
