"""Every method in every kind of layout of both backends: steps and metrics are those of a plain Hugging Face loop.

Ranks start once a layout and run all methods in turn on the same batch, each from the first weights on.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from qwench.config.layout import ParallelLayout
from qwench.config.sections.training import TrainingConfig
from qwench.training.critic import Critic
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.megatron.megatron_trainer import MegatronTrainer
from qwench.training.reference import Reference
from qwench.training.trainer import Trainer
from tests.contract import train_backend_cases
from tests.contract.method_cases import CASES, OPTIMIZER, MethodCase, Models, cases_for, draw_rollout, run_case
from tests.contract.plain_trainer import PlainTrainer
from tests.contract.rank_processes import joined, run_ranks
from tests.deadlines import patient
from tests.fakes import cuda_stand_in

_TIMEOUT_S = patient(300)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where ranks have the model."""

    world_size: int
    megatron: ParallelLayout | None = None
    """None: FSDP2."""
    dp_replicate: int = 1

    @property
    def cases(self) -> Mapping[str, MethodCase]:
        """Return what runs here."""
        splits = self.megatron is not None and (self.megatron.tp > 1 or self.megatron.cp > 1)
        return {name: CASES[name] for name in cases_for(splits_logits=splits)}


LAYOUTS = {
    "fsdp": Layout(world_size=1),
    "fsdp-2": Layout(world_size=2),
    "fsdp-2x2": Layout(world_size=4, dp_replicate=2),
    "megatron-dp2": Layout(world_size=2, megatron=ParallelLayout()),
    "megatron-tp2-sp": Layout(world_size=2, megatron=ParallelLayout(tp=2, sequence_parallel=True)),
    "megatron-pp2": Layout(world_size=2, megatron=ParallelLayout(pp=2)),
    "megatron-cp2": Layout(world_size=2, megatron=ParallelLayout(cp=2)),
    "megatron-tp2-cp2": Layout(world_size=4, megatron=ParallelLayout(tp=2, cp=2)),
}
PACKED = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 24}
ONE_BY_ONE = {"micro_batch_size": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save policy, teacher and the rollout."""
    folder = tmp_path_factory.mktemp("methods")
    train_backend_cases.write_model(folder / "policy", tied=True)
    train_backend_cases.write_model(folder / "teacher", tied=True, seed=12)
    rollout = draw_rollout(PlainTrainer(folder / "policy", OPTIMIZER))
    (folder / "rollout").write_bytes(pickle.dumps(rollout))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[Mapping[str, float]]]:
    """Return what the plain loop makes of each case."""
    policy, critic, of_logits, teacher = (
        PlainTrainer(folder / name, OPTIMIZER, gives=gives)
        for name, gives in (("policy", "log_probs"), ("policy", "values"), ("policy", "logits"), ("teacher", "log_probs"))
    )
    models = Models(
        policy=policy,
        critic=Critic(critic, policy),
        teacher=Reference(teacher),
        of_logits=of_logits,
        restart=PlainTrainer.restart,
    )
    rollout = (folder / "rollout").read_bytes()
    return {name: run_case(case, models, pickle.loads(rollout), ONE_BY_ONE) for name, case in CASES.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_and_metrics_of_every_method_are_those_of_the_plain_loop(
    folder: Path, expected: dict[str, list[Mapping[str, float]]], name: str
) -> None:
    layout, records = LAYOUTS[name], folder / name
    ranks = [(rank, layout, folder, records) for rank in range(layout.world_size)]
    run_ranks(_run_rank, ranks, folder=records, timeout_s=_TIMEOUT_S)
    wrong = dict[str, str]()
    for rank in range(layout.world_size):
        found = pickle.loads((records / f"{rank}.pickle").read_bytes())
        assert list(found) == list(layout.cases)
        for case, metrics in found.items():
            if metrics != [pytest.approx(one, rel=2e-5, abs=2e-6) for one in expected[case]]:
                wrong[f"{case} on rank {rank}"] = _differences(metrics, expected[case])
    assert not wrong, "\n".join(f"{where}: {what}" for where, what in wrong.items())


def test_the_plain_loop_takes_steps_that_matter(expected: dict[str, list[Mapping[str, float]]]) -> None:
    for case, (_, first, second, *_) in expected.items():
        assert first["train/grad_norm"] > 1e-3 and second["train/grad_norm"] > 1e-3, case
        if "train/ppo_kl" in second:
            assert abs(second["train/ppo_kl"] - first["train/ppo_kl"]) > 1e-3, case


def _differences(found: list[Mapping[str, float]], expected: list[Mapping[str, float]]) -> str:
    return "; ".join(
        f"{place}: {name} {one.get(name)} is not {other.get(name)}"
        for place, (one, other) in enumerate(zip(found, expected, strict=True))
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or one[name] != pytest.approx(other[name], rel=2e-5, abs=2e-6)
    )


def _run_rank(rank: int, layout: Layout, folder: Path, records: Path) -> None:
    torch.set_num_threads(1)
    with joined(rank, layout.world_size, records / "store", timeout_s=_TIMEOUT_S):
        build = _builder(layout, folder / "policy")
        models = _models(build, folder)
        rollout = (folder / "rollout").read_bytes()
        made = {name: run_case(case, models, pickle.loads(rollout), PACKED) for name, case in layout.cases.items()}
        (records / f"{rank}.pickle").write_bytes(pickle.dumps(made))
        del models
        if layout.megatron is not None:
            parallel_state.destroy_model_parallel()


def _models(build: Callable[..., Trainer], folder: Path) -> Models:
    policy, critic, of_logits = build(), build(critic=True), build(logits=True)
    policy.load(folder / "teacher", weights_only=True)
    teacher = Reference(policy)

    def restart(trainer: Trainer) -> None:
        trainer.load(folder / "policy", weights_only=True)
        trainer.forget_moments()

    return Models(policy=policy, critic=Critic(critic, policy), teacher=teacher, of_logits=of_logits, restart=restart)


def _builder(layout: Layout, model: Path) -> Callable[..., Trainer]:
    common = {"training": TrainingConfig(), "optimizer": OPTIMIZER, "total_steps": 100}
    on_cpu = {"param_dtype": torch.float32, "device": torch.device("cpu")}
    if layout.megatron is None:
        return partial(FsdpTrainer.build, model, dp_replicate=layout.dp_replicate, **common, **on_cpu)
    cuda_stand_in.install()
    return partial(MegatronTrainer.build, model, layout=layout.megatron, collective_timeout_s=_TIMEOUT_S, **common, **on_cpu)
