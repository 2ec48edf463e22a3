"""The checkpoint of a run that a signal ends."""

import fcntl
import os
from pathlib import Path

import pytest

from qwench.checkpoints.manager import CheckpointManager
from tests.fakes.learner import CountingLearner, CountingRollouts
from tests.unit.checkpoints.test_manager import manager_of, names_in, restored, save_all


def restored_manager(folder: Path) -> CheckpointManager:
    manager = manager_of(save=folder)
    manager.restore(CountingLearner(), CountingRollouts())
    return manager


@pytest.mark.parametrize("next_rollout_id", [1, 2])
def test_a_fresh_run_saves_what_it_learned(tmp_path, next_rollout_id):
    said = restored_manager(tmp_path).save_stopped(next_rollout_id, CountingLearner(7), CountingRollouts(next_rollout_id))
    assert said == f"Checkpoint {next_rollout_id} is in --save {tmp_path}; the same command continues with it."
    assert restored(save=tmp_path) == (next_rollout_id, 7, next_rollout_id)


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    save_all(manager_of(save=tmp_path), 1, 2)
    manager = restored_manager(tmp_path)
    manager.save_stopped(2, CountingLearner(7), CountingRollouts(9))
    assert restored(save=tmp_path) == (2, 102, 2)
    manager.save(3, CountingLearner(103), CountingRollouts(3))
    manager.save_stopped(3, CountingLearner(7), CountingRollouts(9))
    assert restored(save=tmp_path) == (3, 103, 3)


def test_a_run_that_learned_nothing_writes_nothing(tmp_path):
    assert restored_manager(tmp_path).save_stopped(0, CountingLearner(7), CountingRollouts(0)) == "Nothing was learned yet."
    assert names_in(tmp_path) == ["qwench_run.json"]


def test_a_run_without_a_folder_says_what_it_loses():
    said = manager_of().save_stopped(3, CountingLearner(7), CountingRollouts(3))
    assert said == "What was learned from 3 rollouts is lost: --save is not given."


def is_locked(file: Path) -> bool:
    """Ask in another process: the lock is of this one."""
    child = os.fork()
    if child == 0:
        try:
            with file.open("a") as stream:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_the_folder_is_free_when_the_manager_has_finished(tmp_path):
    manager = manager_of(save=tmp_path)
    assert is_locked(tmp_path / "qwench.lock")
    manager.finish()
    assert not is_locked(tmp_path / "qwench.lock")
