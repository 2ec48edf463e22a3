"""A step on shards of masters: clipping, learning rates, the order of its parts, and the state that checkpoints name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qwench.models.megatron_names import WeightRule
from qwench.training.megatron import optimizer
from qwench.training.megatron.muon import MatrixShard
from qwench.training.megatron.optimizer import MasterOptimizer, OwnedShard

Said = list[object]


def keep(said: Said, name: str, result: object = None) -> Callable[..., object]:
    def act(*given: object) -> object:
        said.append((name, *given) if given else name)
        return result

    return act


def made(said: Said, *, clip: float = 2.0, stateless: bool = False, muon: bool = False) -> MasterOptimizer:
    """Return an optimizer whose parts say what they do."""
    master = object.__new__(MasterOptimizer)
    master.num_steps, master._clip_grad, master._is_stateless = 5, clip, stateless
    master._model = SimpleNamespace(zero_grad_buffer=keep(said, "zero the buffer"))
    master.schedule = SimpleNamespace(at=lambda step: step / 10)
    master._config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8="flag")
    master.sharded = SimpleNamespace(
        get_parameters=lambda: "parameters", param_groups=[{"params": 1, "wd_mult": 0.5}, {"params": 2, "wd_mult": 1.5}],
        **{name: keep(said, name) for name in ("step_with_ready_grads", "zero_grad", "prepare_grads")},
        get_grad_norm=keep(said, "get_grad_norm", torch.tensor(3.0)),
    )  # fmt: skip
    master._adam, master._muon = part(said, "adam"), part(said, "muon") if muon else None
    return master


def part(said: Said, name: str) -> SimpleNamespace:
    acts = {act: keep(said, f"{name} {act}") for act in ("restart", "reload_masters", "step")}
    return SimpleNamespace(**acts, param_groups=[{}], device_tensors=lambda: [f"of {name}"])


@pytest.mark.parametrize(
    ("clip", "norm", "clips"), [(2.0, 2.1, True), (2.0, 2.0, False), (2.0, 1.0, False), (0.0, 5.0, False), (-1.0, 5.0, False)]
)
def test_a_gradient_longer_than_the_limit_is_clipped(
    clip: float, norm: float, clips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: Said = []
    monkeypatch.setattr(optimizer, "clip_grad_by_total_norm_fp32", lambda *given: said.append(given))
    master = made(said, clip=clip)
    assert master.step(norm) == [0.5, 0.5] and master.num_steps == 6
    clipped = [("parameters", clip, norm, "flag")] * clips
    assert said == [*clipped, "step_with_ready_grads", "zero the buffer", "zero_grad"]
    assert [group["lr"] for group in master.sharded.param_groups] == [0.5, 0.5]


def test_muon_steps_before_the_weights_are_gathered_and_a_stateless_step_begins_anew() -> None:
    said: Said = []
    master = made(said, stateless=True, muon=True)
    assert master.step(1.0) == [0.5, 0.5]
    restarts = [("adam restart", 0), ("muon restart", 0)]
    assert said == [*restarts, "muon step", "step_with_ready_grads", "zero the buffer", "zero_grad"]
    assert master._muon.param_groups == [{"lr": 0.5}]


def test_the_norm_is_that_of_reduced_gradients() -> None:
    said: Said = []
    assert made(said).grad_norm() == 3.0 and said == ["prepare_grads", "get_grad_norm"]


def test_a_checkpoint_begins_with_masters_of_the_weights_and_moments_of_zero() -> None:
    said: Said = []
    master = made(said, muon=True)
    master.reset(9)
    assert master.num_steps == 9
    assert said == [one for name in ("adam", "muon") for one in (f"{name} reload_masters", (f"{name} restart", 9))]
    said.clear()
    master.forget_moments()
    assert said == [("adam restart", 0), ("muon restart", 0)] and master.num_steps == 9
    assert master.device_tensors() == ["of adam", "of muon"]
    assert master.group_constants() == [{"wd_mult": 0.5}, {"wd_mult": 1.5}]


def test_each_shard_is_named_with_its_range_and_its_optimizers_state() -> None:
    master = made([], muon=True)
    weights = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    shards = [torch.zeros(2), torch.zeros(3)]
    master._adam.param_groups = [{"params": [shards[0]]}, {"params": ["other", shards[1]]}]
    master._adam.moment_names, master._muon.moment_names = ("exp_avg", "exp_avg_sq"), ("momentum",)
    master._adam.state = {shards[0]: {"master_param": "m", "exp_avg": "a", "exp_avg_sq": "s", "step": 1}}
    master._muon.state = {shards[1]: {"master_param": "n", "momentum": "v", "step": 1}}
    ranges = {weights[0]: (1, 3), weights[1]: (0, 3)}
    master.sharded.model_param_group_index_map = {weights[0]: (0, 0), weights[1]: (1, 1)}
    master.sharded._get_model_param_range_map = lambda weight: {
        "param": SimpleNamespace(start=ranges[weight][0], end=ranges[weight][1])
    }
    assert list(master.owned_shards()) == [
        OwnedShard(weight=weights[0], start=1, stop=3, state={"master_param": "m", "exp_avg": "a", "exp_avg_sq": "s"}),
        OwnedShard(weight=weights[1], start=0, stop=3, state={"master_param": "n", "momentum": "v"}),
    ]
    rule = WeightRule(megatron_name="a", hf_names=("a",), checkpoint_key="a")
    assert master._matrix_shard(rule, weights[0]) == MatrixShard(rule=rule, weight=weights[0], values=shards[0], start=1)
    assert master._matrix_shard(rule, weights[2]) == MatrixShard(rule=rule, weight=weights[2], values=None)
