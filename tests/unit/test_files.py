"""Folders that belong to someone, files that are written whole, and what is said of a disk."""

import errno
import os
import shutil
from pathlib import Path
from threading import Event, current_thread
from types import SimpleNamespace

import pytest

from qwench import files
from qwench.errors import ConfigError, OutputError
from qwench.files import (
    check_can_hold,
    claim_folder,
    fill_rollout_id,
    foreign_names,
    fsync_tree,
    is_occupied,
    is_trouble_of_disk,
    nearest_existing,
    read_small_text,
    readable_size,
    remove,
    replace_folder,
    trouble,
    write_atomically,
    writing_back,
    written,
)
from tests.deadlines import patient


@pytest.fixture
def events(monkeypatch, tmp_path):
    """Return what is forced to the disk and renamed, in order."""
    seen, fsync, replace = [], os.fsync, Path.replace

    def record_fsync(descriptor):
        seen.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)))
        fsync(descriptor)

    def record_replace(source, target):
        seen.append(("rename", source.name, target.name))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, events):
    path = tmp_path / "new" / "run" / "a.json"
    for content in ("caf\u00e9", b"bytes"):
        write_atomically(path, content)
        temporary = events[0][1].name
        folder = Path("new", "run")
        assert events == [("fsync", folder / temporary), ("rename", temporary, "a.json"), ("fsync", folder)]
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert [one.name for one in path.parent.iterdir()] == ["a.json"]
        events.clear()


def test_a_file_that_cannot_be_renamed_leaves_the_old_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def refuse(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a", "old")]
    with pytest.raises(OSError, match="Is a directory"):
        (tmp_path / "b.writing").mkdir()
        write_atomically(tmp_path / "b", "new")
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")


def test_a_folder_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, events):
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    for place, text in ((whole, "new"), (folder, "old")):
        (place / "deep").mkdir(parents=True)
        (place / "deep" / "a").write_text(text)
        (place / "z").write_text(text)
    (tmp_path / "folder.old.writing").mkdir()
    (tmp_path / "folder.old.writing" / "of a start that was killed").touch()
    replace_folder(folder, whole)
    forced = [Path("whole/deep/a"), Path("whole/deep"), Path("whole/z"), Path("whole")]
    assert events == [*(("fsync", path) for path in forced), ("rename", "whole", "folder"), ("fsync", Path())]
    assert [one.name for one in tmp_path.iterdir()] == ["folder"] and (folder / "deep" / "a").read_text() == "new"
    (tmp_path / "other").mkdir()
    replace_folder(tmp_path / "made", tmp_path / "other")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "made"]


def test_what_was_forced_to_the_disk_is_closed(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    before = len([*Path("/proc/self/fd").iterdir()])
    files.fsync(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        files.fsync(tmp_path)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_names_of_a_folder_are_forced_to_the_disk_last(tmp_path, events):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").touch()
    (tmp_path / "a").touch()
    fsync_tree(tmp_path)
    assert [path for _, path in events] == [Path("a"), Path("b/c"), Path("b"), Path()]


def test_files_are_forced_to_the_disk_while_they_are_written_and_an_error_of_it_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WRITE_BACK_PAUSE_S", 0.0)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").touch()
    forced, came = [], Event()

    def record(path):
        assert current_thread().name.startswith("write-back_")
        forced.append(path)
        came.set()

    monkeypatch.setattr(files, "fsync", record)
    with writing_back(tmp_path):
        assert came.wait(patient(10))
    assert set(forced) == {tmp_path / "deep" / "a"}

    def refuse(path):
        came.set()
        raise OSError(errno.EIO, "Input/output error")

    came.clear()
    monkeypatch.setattr(files, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"), writing_back(tmp_path):
        assert came.wait(patient(10))


def test_of_a_link_only_the_link_goes(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    remove(tmp_path / "link")
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]
    remove(tmp_path / "mine")
    remove(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_belongs_to_who_marked_it_first(tmp_path):
    folder = tmp_path / "run"
    words = {"marker": "owner.json", "flag": "--out", "held": "another's work", "writer": "tour", "own": ()}

    def claim(*owners, **changed):
        claim_folder(folder, owners=owners, **{"writes": True, **words, **changed})

    claim({"seed": 1}, writes=False)
    assert not folder.exists()
    claim({"seed": 1}, {"seed": 2})
    assert (folder / "owner.json").read_text() == '{\n "seed": 1\n}\n'
    claim({"seed": 2}, {"seed": 1})
    for marker in ('{"seed": 1}', "{"):
        (folder / "owner.json").write_text(marker)
        with pytest.raises(ConfigError, match=rf"^--out {folder} holds another's work; give another folder\.$"):
            claim({"seed": 3})
    (folder / "owner.json").unlink()
    for name in "dcba":
        (folder / name).touch()
    with pytest.raises(ConfigError, match=rf"^--out {folder} holds files that no tour wrote \(a, b, c\); give an empty or new"):
        claim({"seed": 1})
    claim({"seed": 1}, own=[folder / name / "below" for name in "abcd"])


def test_a_folder_that_cannot_be_marked_is_one_sentence_with_its_room(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--out .*/file/run cannot be written to \(Not a directory; .*iB free\); give"):
        claim_folder(
            tmp_path / "file" / "run", owners=({},), marker="m", flag="--out", held="", writer="run", own=(), writes=True
        )


def test_what_others_have_in_a_folder_is_neither_ours_nor_the_output_of_this_process(tmp_path):
    assert foreign_names(tmp_path / "absent", own=()) == []
    (tmp_path / "file").touch()
    assert foreign_names(tmp_path / "file", own=()) == ["file"]
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    assert foreign_names(tmp_path, own=[tmp_path / "file"]) == ["lost"]
    for stream in (1, 2):
        before = os.dup(stream)
        try:
            with (tmp_path / "log").open("w") as log:
                os.dup2(log.fileno(), stream)
            assert foreign_names(tmp_path, own=()) == ["file", "lost"]
        finally:
            os.dup2(before, stream)
            os.close(before)
    assert foreign_names(tmp_path, own=()) == ["file", "log", "lost"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Make room there; then the same command goes on"),
        (errno.EDQUOT, "Make room there; then the same command goes on"),
        (errno.EROFS, "Make room there; then the same command goes on"),
        (errno.EFBIG, "Make room there; then the same command goes on"),
        (errno.EIO, "Make room there; then the same command goes on"),
        (errno.EACCES, "Make it writable"),
    ],
)
def test_an_error_of_writing_is_one_sentence_with_what_to_do(tmp_path, monkeypatch, number, advice):
    monkeypatch.setattr(shutil, "disk_usage", {tmp_path: SimpleNamespace(free=3 * 2**20, total=2**31)}.__getitem__)
    error = OSError(number, "refused")
    assert is_trouble_of_disk(error) is (number != errno.EACCES)
    with pytest.raises(OutputError) as said, written("--out x", tmp_path / "not" / "yet"):
        raise error
    assert str(said.value) == f"--out x cannot be written to (refused; 3.0 MiB of 2.0 GiB free). {advice}."


def test_a_disk_of_which_nothing_is_known_is_not_described(tmp_path, monkeypatch):
    def refuse(place):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert (trouble(OSError(errno.ENOSPC, "full"), tmp_path), trouble(OSError("odd"), tmp_path)) == ("full", "odd")
    assert not is_trouble_of_disk(ValueError())


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0.0 KiB"), (2**20 - 1, "1024.0 KiB"), (2**20, "1.0 MiB"), (2**30 - 1, "1024.0 MiB"), (2**30, "1.0 GiB"),
        (3 * 2**29, "1.5 GiB"),
    ],
)  # fmt: skip
def test_a_size_has_one_decimal_and_its_unit(num_bytes, text):
    assert readable_size(num_bytes) == text


def test_a_place_to_write_to_is_found_out_without_making_it(tmp_path, monkeypatch):
    folder = tmp_path / "not" / "yet"
    assert nearest_existing(folder) == tmp_path
    usage = {tmp_path: SimpleNamespace(free=2**20)}
    monkeypatch.setattr(shutil, "disk_usage", usage.__getitem__)
    check_can_hold(folder, flag="--out", nbytes=2**20)
    with pytest.raises(ConfigError) as short:
        check_can_hold(folder, flag="--out", nbytes=2**20 + 1)
    assert str(short.value) == (
        f"--out {folder} needs 1.0 MiB, but the disk of {tmp_path} has 1.0 MiB free; give another disk."
    )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, what in (("file", "is a file"), ("link", "is a link that leads nowhere")):
        with pytest.raises(
            ConfigError, match=rf"^--out .* cannot be written to: {tmp_path / name} {what}; give another path\.$"
        ):
            check_can_hold(tmp_path / name / "below", flag="--out")
    for number, reason in ((errno.EACCES, "no permission to write into"), (errno.EROFS, "Read-only file system in")):

        def refuse(*, dir, number=number):  # noqa: A002 - the name that tempfile has
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files, "TemporaryFile", refuse)
        with pytest.raises(ConfigError, match=rf"^--out {folder} cannot be written to: {reason} {tmp_path}; give another path"):
            check_can_hold(folder, flag="--out")


def test_an_empty_folder_is_not_occupied(tmp_path):
    assert not is_occupied(tmp_path) and not is_occupied(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert is_occupied(tmp_path) and is_occupied(tmp_path / "file")


@pytest.mark.parametrize(
    ("template", "path"), [("a", "a"), ("r-{rollout_id}", "r-7"), ("r-{rollout_id:04d}", "r-0007"), ("{{}}", "{}")]
)
def test_a_template_has_the_number_of_the_rollout(template, path):
    assert fill_rollout_id(template, 7, flag="--save-hf") == path


@pytest.mark.parametrize(
    "template", ["{}", "{rank}", "{rollout_id.real}", "{rollout_id!r}", "{rollout_id:x}", "{rollout_id", "}"]
)
def test_a_template_has_no_other_field(template):
    with pytest.raises(ConfigError, match=r"^--save-hf '.*' has a placeholder other than \{rollout_id\}; use only that one\."):
        fill_rollout_id(template, 7, flag="--save-hf")


def test_a_template_makes_no_name_that_no_file_can_have():
    longest = "\u00e9" * 127 + "{rollout_id}"
    assert len(os.fsencode(fill_rollout_id(longest, 7, flag="--save-hf"))) == 255
    with pytest.raises(ConfigError, match=r"^--save-hf has a name of more than 255 bytes, got '.{80}'; shorten it\.$"):
        fill_rollout_id(longest, 10, flag="--save-hf")


def test_a_small_file_is_read_and_a_large_one_refused(tmp_path):
    (tmp_path / "a").write_text("caf\u00e9", encoding="utf-8")
    assert read_small_text(tmp_path / "a") == "caf\u00e9"
    (tmp_path / "b").touch()
    os.truncate(tmp_path / "b", 64 * 2**20)
    assert len(read_small_text(tmp_path / "b")) == 64 * 2**20
    os.truncate(tmp_path / "b", 64 * 2**20 + 1)
    with pytest.raises(OSError, match="it has more than 64 MiB"):
        read_small_text(tmp_path / "b")
