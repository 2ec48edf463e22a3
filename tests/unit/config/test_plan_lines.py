"""What a dry run says: each line that only some runs have."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.plan_lines import plan_lines
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.critic import CriticConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.training import TrainingConfig
from tests.unit.config.architectures import QWEN3_4B


def lines_of(staleness: int, *, eval_num_gpus: int = 0) -> list[str]:
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=8, num_rollout=2),
        asynchronous=AsyncConfig(fully_async=True, max_weight_staleness=staleness),
        cluster=ClusterConfig(rollout_num_gpus=2),
        evaluation=EvalConfig(eval_num_gpus=eval_num_gpus, eval_prompt_data=("a", "a.jsonl")),
    )
    return list(plan_lines(config, plan_run(config, QWEN3_4B)))


@pytest.mark.parametrize(("staleness", "advice"), [(0, ""), (2, " (--lr: that of a run in turn, divided by 3)")])
def test_the_bound_is_named_with_the_learning_rate_that_bears_it(staleness: int, advice: str) -> None:
    expected = f"rollouts: 2, generated without a stop; trained tokens are at most {staleness} versions old{advice}"
    assert expected in lines_of(staleness)


def test_engines_for_evaluation_are_named() -> None:
    assert "engines: embedded (the default), 2 engines of 1 device" in lines_of(1)
    assert "engines: embedded (the default), 3 engines of 1 device; the last 1 for evaluations alone" in lines_of(
        1, eval_num_gpus=1
    )


@pytest.mark.parametrize(
    ("compilers", "on_gpus", "sections", "said"),
    [
        ([], False, {}, ", without the C++ kernels: no g++ or clang++ is installed"),
        ([], True, {}, ""),
        (["/usr/bin/g++"], False, {}, ""),
        ([], False, {"engine": EngineConfig(embedded_native_kernels=False)}, ""),
        ([], False, {"training": TrainingConfig(batch_invariant_mode=True)}, ""),
    ],
)
def test_kernels_that_cannot_be_compiled_are_named(monkeypatch, compilers, on_gpus, sections, said) -> None:
    monkeypatch.setattr("qwench.config.plan_lines.find_compilers", lambda: compilers)
    config = Config(rollout=BATCH, **sections)
    assert f"engines: embedded (the default), 1 engine of 1 device{said}" in plan_lines(
        config, plan_run(config, QWEN3_4B, on_gpus=on_gpus)
    )


BATCH = RolloutConfig(rollout_batch_size=8, num_rollout=2)
PPO = AlgorithmConfig(advantage_estimator="ppo")
WITH_KL = AlgorithmConfig(use_kl_loss=True)
SERVERS = DistillationConfig(use_opd=True, opd_type="sglang", opd_teacher_urls=("a=http://x/1", "b=http://y/1"))
FROZEN = DistillationConfig(use_opd=True, opd_type="megatron", opd_teacher_load=Path("teacher"))


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        ({}, ["rollouts: 2", "devices: shared by trainer and engines", "reference model: not needed"]),
        (
            {"rollout": RolloutConfig(rollout_batch_size=8, num_epoch=3, rollouts_ahead=1)},
            ["rollouts: those of 3 epochs, generated one ahead of training"],
        ),
        (
            {
                "cluster": ClusterConfig(rollout_num_gpus=4, rollout_num_gpus_per_engine=2),
                "evaluation": EvalConfig(eval_prompt_data=("a", "a.jsonl")),
            },
            [
                "devices: trainer and engines apart",
                "engines: embedded (the default), 2 engines of 2 devices",
                "evaluation set a: a.jsonl, 1 response a prompt",
                "evaluations: before the first rollout, and after the last rollout",
            ],
        ),
        (
            {"evaluation": EvalConfig(eval_prompt_data=("a", "a.jsonl"), eval_interval=5, skip_eval_before_train=True)},
            ["evaluations: after every 5 rollouts"],
        ),
        (
            {"engine": EngineConfig(rollout_external_engine_addrs=("h:1",), rollout_engine="sglang", engine_reason="asked")},
            ["engines: sglang (asked), those of --rollout-external-engine-addrs"],
        ),
        (
            {"algorithm": WITH_KL, "lora": LoraConfig(lora_rank=4)},
            ["reference model: the policy without its adapters, no copy"],
        ),
        (
            {"algorithm": AlgorithmConfig(use_kl_loss=True, ref_update_interval=2), "lora": LoraConfig(lora_rank=4)},
            ["reference model: held"],
        ),
        (
            {"distillation": FROZEN},
            ["teacher: frozen weights on the host, which score on the policy's ranks"],
        ),
        (
            {"distillation": SERVERS},
            [f"teacher {name}: scores at {url} during the rollout" for name, url in (("a", "http://x/1"), ("b", "http://y/1"))],
        ),
        # 16 bytes a parameter: weights 2, gradients 4, optimizer 10; 4,022,468,096 parameters are 59.9 GiB.
        (
            {"algorithm": PPO, "critic": CriticConfig(critic_num_gpus_per_node=1)},
            [
                "critic: on 1 rank of its own (DP 1), beside the policy; 59.9 GiB on the device of each, 0 GiB on the host",
                "each trainer rank, without activations: 59.9 GiB on the device (7.49 weights, 15 gradients, 37.5 optimizer), "
                "0 GiB on the host",
            ],
        ),
    ],
)
def test_what_a_run_has_is_a_line(sections, lines):
    config = Config(**{"rollout": BATCH, **sections})
    said = list(plan_lines(config, plan_run(config, QWEN3_4B)))
    assert [line for line in said if line in lines] == sorted(lines, key=said.index)


def test_a_critic_that_rests_on_a_cpu_stays_in_memory():
    config = Config(rollout=BATCH, algorithm=PPO)
    rests = "the one that rests stays in memory, which the next line does not count"
    lines = list(plan_lines(config, plan_run(config, QWEN3_4B, on_gpus=False)))
    assert f"critic: on the ranks of the policy, in turn with it; {rests}" in lines


@pytest.mark.parametrize("lora_base", ["auto", "fp8"])
def test_the_form_of_a_frozen_model_is_named_where_it_is_chosen(lora_base):
    config = Config(rollout=BATCH, lora=LoraConfig(lora_rank=4, lora_base=lora_base))
    (line,) = (line for line in plan_lines(config, plan_run(config, QWEN3_4B)) if line.startswith("LoRA: "))
    assert line.partition("the others are ")[2] == "frozen in bfloat16" + (
        ", projections with adapters in fp8" if lora_base == "fp8" else ""
    )


def test_a_run_that_only_generates_says_nothing_of_a_trainer():
    config = Config(rollout=BATCH, debug=DebugConfig(debug_rollout_only=True))
    said = [line.partition(":")[0] for line in plan_lines(config, plan_run(config, QWEN3_4B))]
    assert said[2:] == ["micro-batches", "rollouts", "engines"]


@pytest.mark.parametrize("lora_init", ["kaiming", "pissa"])
@pytest.mark.parametrize("teaches", [False, True])
@pytest.mark.parametrize("use_kl_loss", [False, True])
def test_a_rank_with_adapters_holds_the_frozen_model_their_state_and_no_reference(lora_init, teaches, use_kl_loss):
    config = Config(
        rollout=BATCH,
        lora=LoraConfig(lora_rank=4, lora_init=lora_init),
        distillation=FROZEN if teaches else DistillationConfig(),
        algorithm=AlgorithmConfig(use_kl_loss=use_kl_loss),
    )
    whole, trained = 4_022_468_096, 8_257_536  # 36 layers x 4 x (in + out) of seven projections
    start = 2 * trained if lora_init == "pissa" else 0
    held = plan_run(config, QWEN3_4B).rank_bytes
    assert (held.weights, held.gradients, held.optimizer) == (2 * whole + 4 * trained + start, 4 * trained, 8 * trained)
    assert held.host == (2 * whole if teaches else 0)


@pytest.mark.parametrize(("backend", "split"), [("fsdp", {}), ("megatron", {"tp": 2, "pp": 2})])
@pytest.mark.parametrize(("lora_base", "saved"), [("fp8", 2 - (1 + 4 / 128**2)), ("nf4", 2 - (0.5 + 4 / 64))])
def test_projections_of_a_quantised_base_take_their_share_of_the_device(backend, split, lora_base, saved):
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    projections = 36 * (2 * 4096 * 2560 + 2 * 1024 * 2560 + 3 * 9728 * 2560)
    held = {
        base: plan_run(
            Config(
                rollout=BATCH,
                lora=LoraConfig(lora_rank=4, lora_base=base),
                training=TrainingConfig(train_backend=backend),
                parallel=ParallelConfig(**{names[name]: size for name, size in split.items()}),
                cluster=ClusterConfig(actor_num_gpus_per_node=4 if split else 1),
            ),
            QWEN3_4B,
        ).rank_bytes
        for base in ("auto", lora_base)
    }
    assert held["auto"].weights - held[lora_base].weights == pytest.approx(saved * projections / (4 if split else 1), abs=1)
