"""A disk that refuses a write: the error names the flag, the place and what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.config.config import Config
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.engines.fleet.servers import ServerCommand, ServerProcess
from qwench.errors import OutputError
from qwench.files import TEMPORARY_SUFFIX
from qwench.launch.outputs import open_logs
from qwench.observability.dumps import save_rollout, save_trajectories
from qwench.samples import Rollout
from qwench.training.batch import save_batch
from tests.fakes.learner import CountingLearner, CountingRollouts
from tests.unit.checkpoints.test_manager import manager_of

ROLLOUT = Rollout(rollout_id=0, groups=[])
BATCH = RolloutBatch(
    tokens=[], loss_mask=[], rewards=torch.ones(0), graded=torch.ones(0, dtype=torch.bool),
    group_ids=torch.ones(0), execution_ids=torch.ones(0),
)  # fmt: skip


def start_server(log_file: Path) -> None:
    command = ServerCommand(
        label="engine 0", argv=(sys.executable, "-c", "pass"), environ={}, log_file=log_file, start_timeout_s=1.0
    )
    ServerProcess(command).launch()


@pytest.mark.parametrize(
    ("named", "write"),
    [
        ("--save-debug-rollout-data {}/{{rollout_id}}", lambda place: save_rollout(f"{place}/{{rollout_id}}", ROLLOUT)),
        ("--save-debug-trajectory-data {}/{{rollout_id}}", lambda place: save_trajectories(f"{place}/{{rollout_id}}", ROLLOUT)),
        ("--save-debug-train-data {}/{{rollout_id}}", lambda place: save_batch(f"{place}/{{rollout_id}}", 0, BATCH, run="")),
        ("--log-dir {}", lambda place: open_logs(Config(), place)),
        ("--save {}", lambda place: open_logs(Config(checkpoint=CheckpointConfig(save=place)), None)),
        ("the log of engine 0, {},", start_server),
    ],
    ids=["rollouts", "trajectories", "batches", "log", "save", "server"],
)
def test_a_place_below_a_file_is_named(tmp_path: Path, named: str, write: Callable[[Path], object]) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "place"
    with pytest.raises(OutputError) as refused:
        write(place)
    named = re.escape(named.format(place))
    words = rf"{named} cannot be written to \((Not a directory|File exists); .* free\)\. Make it writable\."
    assert re.fullmatch(words, str(refused.value)), refused.value


def test_a_note_about_the_end_that_is_refused_names_the_folder(tmp_path: Path) -> None:
    manager = manager_of(save=tmp_path)
    manager.save(1, CountingLearner(), CountingRollouts(1))
    (tmp_path / "iter_0000001" / f"meta.json{TEMPORARY_SUFFIX}").mkdir()
    with pytest.raises(OutputError, match=rf"--save {tmp_path} cannot be written to \(Is a directory"):
        manager.note_end(1, "loss<=1")
