"""When the critic has the device, where its checkpoint lies, and what a new value head holds."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from qwench.models.tensor_parts import HostMemory, Part
from qwench.training.critic import Critic, NewHead
from qwench.training.trainer import Trainer
from tests.unit.config.architectures import QWEN3_4B


class Recorder:
    """A trainer that notes what it is told, in a list that both trainers share."""

    def __init__(self, name: str, events: list[object], device: str = "cpu") -> None:
        self._name, self._events, self.device = name, events, torch.device(device)

    def sleep(self) -> None:
        self._events.append(f"{self._name} sleeps")

    def wake(self) -> None:
        self._events.append(f"{self._name} wakes")

    def save(self, folder: Path, *, with_optimizer: bool) -> None:
        assert folder.is_dir()
        self._events.append(("save", folder, with_optimizer))

    def load(self, folder: Path, *, weights_only: bool, with_rng: bool) -> None:
        self._events.append(("load", folder, weights_only, with_rng))


BEFORE, AFTER = ["policy sleeps", "critic wakes"], ["critic sleeps", "policy wakes"]


@pytest.fixture
def events() -> list[object]:
    return []


@pytest.fixture
def critic(events: list[object]) -> Critic:
    made = Critic(cast(Trainer, Recorder("critic", events)), cast(Trainer, Recorder("policy", events)))
    assert events == ["critic sleeps"]
    events.clear()
    return made


def test_only_one_of_policy_and_critic_is_awake(critic: Critic, events: list[object]) -> None:
    with critic.turn() as trainer:
        assert isinstance(trainer, Recorder)
        events.append("turn")
    assert events == [*BEFORE, "turn", *AFTER]


def test_a_gpu_has_the_memory_of_the_one_that_sleeps_before_the_other_wakes(
    events: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty"))
    trainers = [cast(Trainer, Recorder(name, events, "cuda")) for name in ("critic", "policy")]
    with Critic(*trainers).turn():
        events.append("turn")
    before = ["critic sleeps", "empty", "policy sleeps", "empty", "critic wakes"]
    assert events == [*before, "turn", "critic sleeps", "empty", "policy wakes"]


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_the_critic_is_saved_below_the_checkpoint_also_over_an_older_one(
    critic: Critic, events: list[object], tmp_path: Path, with_optimizer: bool
) -> None:
    critic.save(tmp_path, with_optimizer=with_optimizer)
    critic.save(tmp_path, with_optimizer=with_optimizer)
    assert events == [*BEFORE, ("save", tmp_path / "critic", with_optimizer), *AFTER] * 2


@pytest.mark.parametrize("weights_only", [True, False])
def test_the_critic_is_loaded_where_there_is_one_without_the_policys_random_state(
    critic: Critic, events: list[object], tmp_path: Path, weights_only: bool
) -> None:
    critic.load(tmp_path, weights_only=weights_only)
    assert events == [*BEFORE, *AFTER]
    events.clear()
    (tmp_path / "critic").mkdir()
    critic.load(tmp_path, weights_only=weights_only)
    assert events == [*BEFORE, ("load", tmp_path / "critic", weights_only, False), *AFTER]


def test_a_new_head_scores_every_context_with_zero_and_keeps_the_decoder() -> None:
    class Ones:
        def read(self, name: str) -> Tensor:
            assert name != "lm_head.weight", "a language model's head has another shape"
            return torch.ones(3)

        def read_part(self, name: str, part: Part, memory: HostMemory) -> Tensor:
            return part.of(self.read(name))

    weights = NewHead(Ones(), QWEN3_4B.as_critic())
    assert torch.equal(weights.read("lm_head.weight"), torch.zeros(1, 2560))
    assert weights.read("model.norm.weight").tolist() == [1.0, 1.0, 1.0]
    part, memory = Part(start=0, stop=1), HostMemory()
    assert torch.equal(weights.read_part("lm_head.weight", part, memory), torch.zeros(1, 2560))
    assert weights.read_part("model.norm.weight", part, memory).tolist() == [1.0]
