"""A process dies by SIGKILL right before its n-th file operation, for every n; then the same command starts again."""

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwench.checkpoints.manager import CheckpointManager
from qwench.checkpoints.manifest import read_manifest
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.observability.console import QuietConsole
from tests.fakes.learner import CountingLearner, CountingRollouts

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
MAX_EVENTS = 500


def manager_of(folder: Path, **flags) -> CheckpointManager:
    return CheckpointManager(CheckpointConfig(save=folder, load=folder, **flags), {}, QuietConsole())


def dies_before_event(number: int, act: Callable[[], None]) -> bool:
    """Run `act` in a child that kills itself before its `number`-th file operation; false when it ended before that."""
    child = os.fork()
    if child == 0:
        _act_and_die(number, act)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "the child failed by itself"
    return os.WIFSIGNALED(status)


def _act_and_die(number: int, act: Callable[[], None]) -> None:
    seen = 0

    def hook(event: str, _: tuple) -> None:
        nonlocal seen
        if event in FILE_EVENTS:
            seen += 1
            if seen > number:
                os.kill(os.getpid(), signal.SIGKILL)

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
    outcomes = []
    for number in range(MAX_EVENTS):
        folder = tmp_path / f"killed_{number}"
        shutil.copytree(template, folder)
        died = dies_before_event(number, lambda folder=folder: save(folder, saved, 200 + saved, **flags))
        outcome = restored(folder, **flags)
        assert outcome in (previous, (saved, 200 + saved, saved)), f"killed before file operation {number}"
        left = [path for path in folder.iterdir() if path.name.startswith("iter_")]
        assert [path.name for path in left if path.suffix] == []
        assert all(read_manifest(path) for path in left)
        save(folder, saved, 300 + saved, **flags)
        assert restored(folder, **flags) == (saved, 300 + saved, saved)
        outcomes.append(outcome)
        shutil.rmtree(folder)
        if not died:
            break
    assert not died, "the save never ended"
    assert len(outcomes) > 20, "the kills did not reach into the save"
    assert {outcomes[0], outcomes[-1]} == {previous, (saved, 200 + saved, saved)}
    # Once the new checkpoint is there, it stays: no later operation brings the previous one back.
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome != previous)


def test_kill_while_a_start_cleans_up_is_cleaned_up_by_the_next(tmp_path):
    template = tmp_path / "template"
    save(template, 1, 101)
    for name in ("iter_0000002.writing", "iter_0000003.deleting", "iter_0000001.replaced"):
        shutil.copytree(template / "iter_0000001", template / name)
    for number in range(MAX_EVENTS):
        folder = tmp_path / f"killed_{number}"
        shutil.copytree(template, folder)
        died = dies_before_event(number, lambda folder=folder: restored(folder) and None)
        assert restored(folder) == (1, 101, 1)
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["iter_0000001"]
        if not died:
            break
    assert not died
