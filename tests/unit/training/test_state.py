"""What the models of a rank are told: of all of them on the policy's ranks, of the critic alone on its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.training import state
from qwench.training.critic_learner import CriticLearner, CriticState
from qwench.training.reference import PastPolicies, Reference
from qwench.training.state import TrainingState
from tests.fakes.trainer import TableTrainer


class Said:
    """Notes each call of a method, and returns its name."""

    def __init__(self, said: list[object], name: str) -> None:
        self._said, self._name, self.device = said, name, torch.device("cuda", 1)

    def __getattr__(self, method: str) -> object:
        def call(*given: object, **options: object) -> str:
            self._said.append((f"{self._name} {method}", *given, *options.values()))
            return method

        return call


class Moving(Reference):
    def __init__(self, said: list[object]) -> None:
        self._told = Said(said, "reference")

    def save(self, folder: Path) -> None:
        assert folder.is_dir()
        self._told.save(folder)

    def load(self, folder: Path) -> None:
        self._told.load(folder)


def _state(said: list[object], *, moves: bool = True, alone: bool = False) -> TrainingState:
    reference = None if alone else Moving(said)
    others = {name: None if alone else Said(said, name) for name in ("critic", "past_policies")}
    return TrainingState(Said(said, "policy"), reference, reference_moves=moves, teacher=Said(said, "teacher"), **others)


@pytest.mark.parametrize("alone", [False, True])
def test_a_checkpoint_holds_the_models_that_change_and_the_policy_is_read_last(tmp_path: Path, alone: bool) -> None:
    said = list[object]()
    made = _state(said, alone=alone)
    for _ in range(2):
        said.clear()
        made.save(tmp_path, with_optimizer=False)
        others = [
            ("reference save", tmp_path / "reference"),
            ("critic save", tmp_path, False),
            ("past_policies save", tmp_path / "past"),
        ]
        assert said == [("policy save", tmp_path, False), *([] if alone else others)]
    said.clear()
    made.load(tmp_path, weights_only=True, with_rng=False)
    others = [
        ("reference load", tmp_path / "reference"),
        ("critic load", tmp_path, True),
        ("past_policies load", tmp_path / "past"),
    ]
    assert said == [*([] if alone else others), ("policy load", tmp_path, True, False)]
    if not alone:
        (tmp_path / "reference").rmdir()
        said.clear()
        made.load(tmp_path)
        assert [one[0] for one in said] == ["critic load", "past_policies load", "policy load"] and said[-1][2:] == (
            False,
            True,
        )


def test_a_reference_that_stays_is_in_no_checkpoint(tmp_path: Path) -> None:
    said = list[object]()
    _state(said, moves=False).save(tmp_path)
    assert [one[0] for one in said] == ["policy save", "critic save", "past_policies save"] and said[0][2] is True


def test_the_policy_is_published_probed_and_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[object]()
    made = _state(said)
    monkeypatch.setattr(state, "publish_from_rank", lambda *given, link: said.append((*given, link)))
    monkeypatch.setattr(state, "release_cache", said.append)
    made.publish(["engine"], 7, "plan")
    assert said == [(made, ["engine"], 7, "plan", made._link)]
    said.clear()
    assert made.weights(bucket_bytes=9, part="adapter") == "weights" and made.shared_weights("apart") == "shared_weights"
    made.sleep()
    made.wake()
    made.release_cache()
    assert said == [
        ("policy weights", 9, "adapter"), ("policy shared_weights", "apart"), ("policy sleep",), ("policy wake",),
        torch.device("cuda", 1),
    ]  # fmt: skip
    assert made.probe_memory(SimpleNamespace(run=lambda *models: models)) == (made.policy, made.critic)
    made._link = Said(said, "link")
    made.close()
    assert said[-1] == ("link close",)


def test_ranks_of_the_critic_alone_do_what_concerns_the_critic(tmp_path: Path) -> None:
    said = list[object]()
    made = CriticState(Said(said, "critic"))
    made.save(tmp_path, with_optimizer=False)
    made.load(tmp_path, weights_only=True)
    assert said == [("critic save", tmp_path / "critic", False), ("critic load", tmp_path / "critic", True, False)]
    said.clear()
    made.publish(["engine"], 7, "plan")
    for act in (made.sleep, made.wake, made.release_cache, made.close):
        act()
    assert said == [] and list(made.weights(bucket_bytes=1)) == [] == CriticLearner.log_probs(made, [], 1.0)
    own = SimpleNamespace(run=lambda critic, other: f"probe of {critic is made.critic} and {other}")
    probe = SimpleNamespace(of_critic=own, run=lambda *models: "another probe")
    assert made.probe_memory(probe) == "critic's probe of True and None"
    assert made.probe_memory(SimpleNamespace(of_critic=None, run=own.run)) == "critic's probe of True and None"


def test_past_weights_are_read_in_order_of_their_versions_and_the_newest_alone(tmp_path: Path) -> None:
    for version in (2, 9, 10, 11):
        (tmp_path / "past" / str(version)).mkdir(parents=True)
        TableTrainer(torch.full((2, 2), float(version))).save(tmp_path / "past" / str(version))
    past = PastPolicies(TableTrainer(torch.zeros(2, 2)), num_kept=2)
    past.load(tmp_path / "past")
    past.load(tmp_path / "absent")
    assert [*past._kept] == [10, 11]
