"""What processes leave in memory when they end: nothing, also where another thread or process still writes."""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from qwench.wire import memory_files
from qwench.wire.memory_files import RANKS, WEIGHTS, own_prefix, remove_files_of, remove_files_of_the_dead, remove_folder
from qwench.wire.shared_buffer import SharedBuffer, open_buffer


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_of_an_ended_process_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_files, "_MEMORY", tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = [own_prefix(WEIGHTS) + "a", own_prefix(RANKS) + "b", f"other-{ended.pid}-c", f"{WEIGHTS}x-d"]
    dead = [f"{WEIGHTS}{ended.pid}-e", f"{RANKS}{ended.pid}-f"]
    for name in [*alive, dead[0]]:
        (tmp_path / name).write_text("")
    (tmp_path / dead[1]).mkdir()
    (tmp_path / dead[1] / "call_0").write_text("")
    remove_files_of_the_dead()
    assert names(tmp_path) == set(alive)
    remove_files_of(os.getpid())
    assert names(tmp_path) == set(alive[2:])


def test_files_of_a_process_of_another_user_stay(tmp_path, monkeypatch):
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(memory_files, "_MEMORY", tmp_path)
    monkeypatch.setattr(os, "kill", refuse)
    (tmp_path / f"{WEIGHTS}1-e").touch()
    remove_files_of_the_dead()
    assert names(tmp_path) == {f"{WEIGHTS}1-e"}


@pytest.mark.parametrize("removed", [remove_folder, lambda folder: remove_files_of(os.getpid())])
def test_a_folder_that_is_written_to_while_it_is_removed_is_gone(tmp_path, monkeypatch, removed):
    monkeypatch.setattr(memory_files, "_MEMORY", tmp_path)
    folder = tmp_path / (own_prefix(RANKS) + "a")
    folder.mkdir()
    (folder / "call_0").write_text("")
    rmdir = os.rmdir

    def write_first(path, **words):
        with suppress(FileNotFoundError):
            (folder / "bucket").write_text("of a rank that has not ended yet")
        rmdir(path, **words)

    monkeypatch.setattr(os, "rmdir", write_first)
    removed(folder)
    assert names(tmp_path) == set()


def test_a_folder_that_another_process_removes_too_is_gone(tmp_path, monkeypatch):
    folder, rename = tmp_path / "a", Path.rename
    folder.mkdir()

    def after_another(*words):
        monkeypatch.setattr(Path, "rename", rename)
        remove_folder(folder)
        rename(*words)

    monkeypatch.setattr(Path, "rename", after_another)
    remove_folder(folder)
    assert names(tmp_path) == set()


def test_a_process_that_ends_makes_no_more_files(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_files, "_MEMORY", tmp_path)
    making = threading.Lock()
    monkeypatch.setattr(memory_files, "_making", making)
    SharedBuffer.allocate(8, torch.device("cpu"))
    memory_files.leave_no_files()
    late = threading.Thread(target=SharedBuffer.allocate, args=(8, torch.device("cpu")))
    late.start()
    late.join(0.2)
    assert names(tmp_path) == set()
    making.release()  # here the process would have ended
    late.join()


def test_a_buffer_whose_file_is_removed_while_it_is_opened_stays_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_files, "_MEMORY", tmp_path)
    buffer = SharedBuffer.allocate(3, torch.device("cpu"))
    buffer.tensor.copy_(torch.tensor([1, 2, 3]))
    getuid = os.getuid

    def after_removal():
        remove_files_of(os.getpid())
        return getuid()

    monkeypatch.setattr(os, "getuid", after_removal)
    assert open_buffer(buffer.handle()).tolist() == [1, 2, 3]
    assert names(tmp_path) == set()
