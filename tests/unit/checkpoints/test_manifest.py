"""What meta.json notices: files that are missing or are not as they were written."""

import json
import zlib
from pathlib import Path

import pytest

from qwench import __version__
from qwench.checkpoints.manifest import amend_manifest, note_checksums, read_manifest, write_manifest
from qwench.errors import CheckpointError


def _folder(tmp_path: Path, size: int) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "shard").write_bytes(bytes(size))
    write_manifest(tmp_path, {"iteration": 3})
    return tmp_path / "model" / "shard"


def _change_last_byte(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")


@pytest.mark.parametrize("size", [1, 40_000, 8 * 1024**2, 8 * 1024**2 + 1])
def test_one_changed_byte_is_found(tmp_path: Path, size: int):
    file = _folder(tmp_path, size)
    content = read_manifest(tmp_path)
    assert content["iteration"] == 3 and content["files"]["model/shard"]["size"] == size
    _change_last_byte(file)
    with pytest.raises(CheckpointError, match=r"model/shard is damaged: its CRC-32 is \w{8}, not \w{8} as written"):
        read_manifest(tmp_path)


def test_a_changed_byte_before_the_last_block_is_found(tmp_path: Path):
    file = _folder(tmp_path, 8 * 1024**2 + 1)
    with file.open("r+b") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="model/shard is damaged"):
        read_manifest(tmp_path)


def test_a_file_of_another_size_is_named_with_both_sizes(tmp_path: Path):
    _folder(tmp_path, 40_000).write_bytes(b"")
    with pytest.raises(CheckpointError, match="model/shard has size 0, not 40000 as written"):
        read_manifest(tmp_path)


def test_a_changed_byte_passes_where_the_content_is_not_read(tmp_path: Path):
    _change_last_byte(_folder(tmp_path, 40_000))
    assert read_manifest(tmp_path, with_content=False)["files"]["model/shard"]["size"] == 40_000


def test_a_missing_file_is_named(tmp_path: Path):
    _folder(tmp_path, 1).unlink()
    with pytest.raises(CheckpointError, match="model/shard is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no meta.json"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"crc32": 1, "files": {"a": {"size": 1e999, "crc32": 1}}}', "cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "meta.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_a_manifest_is_written_for_people_too_and_keeps_what_is_not_changed(tmp_path: Path):
    _folder(tmp_path, 3)
    (tmp_path / "empty").mkdir()
    for facts in ({"iteration": 3}, {"iteration": 3, "ended_by": "loss<=1"}):
        text = (tmp_path / "meta.json").read_text()
        content = json.loads(text)
        assert text == json.dumps(content, indent=1) + "\n"
        assert content.pop("crc32") == zlib.crc32(json.dumps(content, sort_keys=True).encode())
        files = {"model/shard": {"size": 3, "crc32": zlib.crc32(bytes(3))}}
        assert content == {"qwench_version": __version__, **facts, "files": files}
        amend_manifest(tmp_path, {"ended_by": "loss<=1"})


def test_ranks_note_the_files_that_are_there(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    note_checksums(tmp_path, [tmp_path / "a", tmp_path / "gone"], rank=4)
    assert (tmp_path / "__4.crc32.json").read_text() == json.dumps({"a": zlib.crc32(b"abc")}) + "\n"
