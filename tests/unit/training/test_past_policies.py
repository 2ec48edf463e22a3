"""Old log-probs of the weights that sampled, against the tables that a plain list of copies holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.samples import Rollout
from tests.fakes.trainer import TableTrainer
from tests.unit.training.table_learning import TABLE, TEMPERATURE, make_learner, make_rollout


def sampled_by(*versions: int, rollout_id: int) -> Rollout:
    """Return a rollout whose tokens were sampled by these versions in turn."""
    rollout = make_rollout(rollout_id=rollout_id, seed=rollout_id)
    for sample in rollout.samples:
        sample.weight_versions = [versions[i % len(versions)] for i in range(sample.response_length)]
    return rollout


def expected(rollout: Rollout, tables: list[Tensor]) -> list[list[float]]:
    """Return log-probs of each token under the table of its version; 0 where it is not trained."""
    found = []
    for sample in rollout.samples:
        begin, row = len(sample.tokens) - sample.response_length, []
        for i in range(sample.response_length):
            table = tables[sample.weight_versions[i]]
            token, before = sample.tokens[begin + i], sample.tokens[begin + i - 1]
            row.append(float((table / TEMPERATURE).log_softmax(-1)[before, token]) if sample.loss_mask[i] else 0.0)
        found.append(row)
    return found


class Recorded:
    """A learner of three rollouts, each with the batch that it learned from and the table that it began with."""

    def __init__(self, num_past: int) -> None:
        self.backend = TableTrainer(TABLE, lr=5.0)
        self.tables: list[Tensor] = []
        self.batches: list[RolloutBatch] = []
        others = {"record": lambda _, batch: self.batches.append(batch)}
        self.learner = make_learner(self.backend, num_past=num_past, others=others, advantage_estimator="grpo")

    def learn(self, rollout: Rollout) -> None:
        self.tables.append(self.backend.table.detach().clone())
        self.learner.learn(rollout)

    def check(self, rollout: Rollout, tables: list[Tensor]) -> None:
        batch = self.batches[-1]
        assert batch.old_log_probs is not None
        for got, wanted, mask in zip(batch.old_log_probs, expected(rollout, tables), batch.loss_mask, strict=True):
            assert (got * mask).tolist() == pytest.approx(wanted, abs=1e-6)


def test_each_token_is_scored_by_the_version_that_sampled_it() -> None:
    run = Recorded(num_past=2)
    for rollout in (
        sampled_by(0, rollout_id=0),
        sampled_by(0, rollout_id=1),
        sampled_by(0, 1, 2, rollout_id=2),
        sampled_by(1, 3, 2, rollout_id=3),
    ):
        run.learn(rollout)
        run.check(rollout, run.tables)
    assert not torch.equal(run.tables[0], run.tables[1])
    assert torch.equal(run.tables[3], run.backend.table) is False


def test_weights_that_are_not_kept_are_said_once_and_newer_ones_score(caplog: pytest.LogCaptureFixture) -> None:
    run = Recorded(num_past=1)
    for rollout in (sampled_by(0, rollout_id=0), sampled_by(0, rollout_id=1), sampled_by(0, rollout_id=2)):
        run.learn(rollout)
    run.check(rollout, [run.tables[1], *run.tables[1:]])
    run.learn(sampled_by(0, rollout_id=3))
    assert caplog.messages == [
        "--keep-old-actor: the weights of version 0 are not kept; rollout 2 gets old log-probs of newer ones. "
        "This is said once."
    ]


def test_past_weights_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    whole, cut = Recorded(num_past=2), Recorded(num_past=2)
    for rollout_id in range(2):
        whole.learn(sampled_by(0, rollout_id=rollout_id))
    whole.learner.state.save(tmp_path)
    assert sorted(path.name for path in (tmp_path / "past").iterdir()) == ["0", "1"]
    cut.learner.state.load(tmp_path)
    last = sampled_by(0, 1, 2, rollout_id=2)
    for run in (whole, cut):
        run.learn(last)
        run.check(last, whole.tables)
    assert torch.equal(whole.backend.table, cut.backend.table)


def test_weights_of_versions_to_come_are_not_kept(tmp_path: Path) -> None:
    """A run that begins anew from a checkpoint counts its versions from 0, which the saved ones would push out."""
    before, anew = Recorded(num_past=2), Recorded(num_past=2)
    for rollout_id in range(5, 7):
        before.learn(sampled_by(rollout_id, rollout_id=rollout_id))
    before.learner.state.save(tmp_path)
    anew.learner.state.load(tmp_path)
    for rollout in (sampled_by(0, rollout_id=0), sampled_by(0, rollout_id=1), sampled_by(0, 1, 2, rollout_id=2)):
        anew.learn(rollout)
        anew.check(rollout, anew.tables)
