import os
import subprocess
import sys
from pathlib import Path

from qwench.wire import memory_files
from qwench.wire.memory_files import RANKS, WEIGHTS, own_prefix, remove_files_of, remove_files_of_the_dead


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
