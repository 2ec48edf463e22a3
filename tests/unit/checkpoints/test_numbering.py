"""Checkpoints under the numbers of slime and miles (--save-numbering last)."""

import pytest

from qwench.checkpoints.manager import CheckpointManager
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.errors import ConfigError
from qwench.observability.console import QuietConsole
from tests.fakes.learner import CountingLearner, CountingRollouts
from tests.unit.checkpoints.test_manager import IDENTITY, manager_of, names_in, restored, save_all


def test_folders_are_named_as_slime_and_miles_do_on_request(tmp_path):
    saved = []
    manager = CheckpointManager(
        CheckpointConfig(save=tmp_path / "run", save_numbering="last", save_interval=2, save_retain_interval=4),
        IDENTITY,
        QuietConsole(),
        after_save=lambda rollout_id, folder, exported: saved.append((rollout_id, folder.name)),
    )
    save_all(manager, 2, 4, 5, 6)
    names = ["iter_0000003", "iter_0000004", "iter_0000005"]
    assert saved == [(1, "iter_0000001"), *zip([3, 4, 5], names, strict=True)]
    pointer = "latest_checkpointed_iteration.txt"
    assert names_in(tmp_path / "run") == ["iter_0000003", "iter_0000005", pointer, "qwench_run.json"]
    assert (tmp_path / "run" / pointer).read_text() == "5\n"
    assert restored(save=tmp_path / "run", save_numbering="last") == (6, 106, 6)
    assert restored(save=tmp_path / "other", load=tmp_path / "run") == (6, 106, 6)
    assert restored(save=tmp_path / "other", load=tmp_path / "run", ckpt_step=3) == (4, 104, 4)
    assert "Checkpoint 6 is in --save" in manager_of(save=tmp_path / "run", save_numbering="last").save_stopped(
        7, CountingLearner(107), CountingRollouts(7)
    )
    with pytest.raises(ConfigError, match="iter_0000006 has 7 rollouts learned; give the --save-numbering of its run"):
        restored(save=tmp_path / "run")


def test_the_best_weights_may_have_no_such_number(tmp_path):
    with pytest.raises(ConfigError, match="--keep-best may keep the weights before rollout 0"):
        CheckpointConfig(save=tmp_path, save_numbering="last", keep_best=True)


def test_one_checkpoint_of_a_run_is_told_from_none_and_what_it_lacks_is_said(tmp_path):
    save_all(manager_of(save=tmp_path / "run"), 3)
    one = tmp_path / "run" / "iter_0000003"
    advice = f"give --load {tmp_path / 'run'} --ckpt-step 3, or leave"
    for ref_load in (None, tmp_path / "base"):
        with pytest.raises(ConfigError, match=f"^--load {one} is one checkpoint of a run; {advice}"):
            manager_of(load=one, ref_load=ref_load)
    moved = one.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=f"^--load {moved} is one checkpoint of a run; give the folder of the run, or leave"):
        manager_of(load=moved)
    (moved / "rng.pt").unlink()
    with pytest.raises(
        ConfigError, match=f"^--load {moved} is one checkpoint of a run, and damaged: {moved}/rng.pt is missing; "
    ):
        manager_of(load=moved)
