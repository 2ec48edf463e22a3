"""A process dies by SIGKILL right before its n-th file operation, for every n; then the same command starts again.

What a process leaves that dies then is what the file system shows at that moment: one process acts, and copies the folder
before each of its operations.
"""

import gc
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwench.checkpoints.manager import CheckpointManager
from qwench.checkpoints.manifest import read_manifest
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.observability.console import QuietConsole
from tests.fakes.learner import CountingLearner, CountingRollouts

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
MIN_EVENTS = 20


def manager_of(folder: Path, **flags) -> CheckpointManager:
    return CheckpointManager(CheckpointConfig(save=folder, load=folder, **flags), {}, QuietConsole())


def killed(folder: Path, act: Callable[[], None]) -> Iterator[Path]:
    """Yield what `act` leaves of the folder in a process killed before its 1st, 2nd, ... file operation, and at its end."""
    child = os.fork()
    if child == 0:
        _act_and_copy(folder, act)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child failed by itself"
    copies = sorted(folder.parent.glob(f"{folder.name}.killed_*"))
    assert len(copies) > MIN_EVENTS, "the kills did not reach into the act"
    for copy in [*copies, folder]:
        yield copy
        shutil.rmtree(copy)


def _act_and_copy(folder: Path, act: Callable[[], None]) -> None:
    events, turn, copying = 0, threading.Lock(), threading.local()

    def hook(event: str, _: tuple) -> None:
        nonlocal events
        if event in FILE_EVENTS and not getattr(copying, "now", False):
            with turn:
                copying.now = True
                shutil.copytree(folder, folder.with_name(f"{folder.name}.killed_{events:04d}"))
                copying.now = False
                events += 1

    gc.disable()  # what other tests left behind may wait, on its way out, for threads that a child does not have
    failed = True
    try:
        sys.addaudithook(hook)
        act()
        failed = False
    finally:
        os._exit(int(failed))


def restored(folder: Path, **flags) -> tuple[int, int, int]:
    learner, rollouts = CountingLearner(), CountingRollouts()
    first = manager_of(folder, **flags).restore(learner, rollouts)
    return first, learner.value, rollouts.taken


def save(folder: Path, iteration: int, value: int, **flags) -> None:
    manager_of(folder, **flags).save(iteration, CountingLearner(value), CountingRollouts(iteration))


@pytest.mark.parametrize(
    ("existing", "saved", "flags"),
    [
        ([], 1, {}),
        ([1, 2], 3, {"keep_checkpoints": 1}),
        ([1, 2], 2, {}),  # the run went back with --ckpt-step 1, or 2 was damaged
    ],
    ids=["first", "with retention", "over an older one of the same name"],
)
def test_kill_at_any_file_operation_leaves_the_previous_or_the_new_checkpoint(tmp_path, existing, saved, flags):
    template = tmp_path / "template"
    template.mkdir()
    for iteration in existing:
        save(template, iteration, 100 + iteration)
    previous = restored(template) if existing else (0, 0, 0)
    folder, outcomes = tmp_path / "run", []
    shutil.copytree(template, folder)
    for left in killed(folder, lambda: save(folder, saved, 200 + saved, **flags)):
        outcome = restored(left, **flags)
        assert outcome in (previous, (saved, 200 + saved, saved)), left
        checkpoints = [path for path in left.iterdir() if path.name.startswith("iter_")]
        assert [path.name for path in checkpoints if path.suffix] == []
        assert all(read_manifest(path) for path in checkpoints)
        save(left, saved, 300 + saved, **flags)
        assert restored(left, **flags) == (saved, 300 + saved, saved)
        outcomes.append(outcome)
    assert {outcomes[0], outcomes[-1]} == {previous, (saved, 200 + saved, saved)}
    # Once the new checkpoint is there, it stays: no later operation brings the previous one back.
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome != previous)


def test_kill_while_a_start_cleans_up_is_cleaned_up_by_the_next(tmp_path):
    template = tmp_path / "template"
    save(template, 1, 101)
    for name in ("iter_0000002.writing", "iter_0000003.deleting", "iter_0000001.replaced"):
        shutil.copytree(template / "iter_0000001", template / name)
    folder = tmp_path / "run"
    shutil.copytree(template, folder)
    for left in killed(folder, lambda: restored(folder) and None):
        assert restored(left) == (1, 101, 1)
        assert sorted(path.name for path in left.iterdir() if path.is_dir()) == ["iter_0000001"]
