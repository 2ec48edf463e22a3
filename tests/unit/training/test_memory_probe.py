"""The largest micro-batch that the flags allow, and a pass over it that changes nothing but finds too little memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from qwench.config.config import Config
from qwench.config.plan import RunPlan, plan_run
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import TrainingError
from qwench.training.critic import Critic
from qwench.training.memory_budget import ActivationBudget, kept_bytes
from qwench.training.memory_probe import Longest, MemoryProbe, _loss, largest_lengths
from qwench.training.packed_decoder import Keep
from tests.fakes.trainer import TableTrainer
from tests.unit.config.architectures import QWEN3_4B

V = 7
PROBE = MemoryProbe(
    lengths=(9, 9, 3),
    num_micro_batches=2,
    vocab_size=V,
    temperature=1.0,
    with_entropy=True,
    flag="--max-tokens-per-gpu",
    state_bytes=8 << 30,
    activation_bytes=3 << 30,
)


def _plan(size: int, *, ranks: int = 1, parallel: ParallelConfig | None = None, **training: Any) -> RunPlan:
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=size),
        training=TrainingConfig(global_batch_size=size, **training),
        cluster=ClusterConfig(actor_num_gpus_per_node=ranks, num_gpus_per_node=12),
        parallel=parallel or ParallelConfig(),
    )
    return plan_run(config, QWEN3_4B)


def _table() -> torch.Tensor:
    return torch.randn(V, V, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "ranks", "longest", "lengths"),
    [
        (64, 1, 300, (300, 300, 300, 100)),
        (64, 1, 333, (333, 333, 333)),  # one token more would have no label
        (64, 1, 1000, (1000,)),
        (64, 1, 1500, (1500,)),  # alone, and over the cap
        (2, 1, 300, (300, 300)),  # a step has no more samples
        (4, 2, 300, (300, 300)),  # nor has a rank's share of it
        (4, 3, 300, (300, 300)),  # two, one and one
    ],
)
def test_sequences_fill_a_packed_micro_batch(size: int, ranks: int, longest: int, lengths: tuple[int, ...]) -> None:
    plan = _plan(size, ranks=ranks, use_dynamic_batch_size=True, max_tokens_per_gpu=1000)
    assert largest_lengths(plan, longest) == lengths


def test_the_cap_counts_the_tokens_of_all_context_parallel_ranks() -> None:
    parallel = ParallelConfig(context_parallel_size=2)
    plan = _plan(64, ranks=2, parallel=parallel, use_dynamic_batch_size=True, max_tokens_per_gpu=1000)
    assert largest_lengths(plan, 800) == (800, 800, 400)


def test_micro_batches_that_are_counted_have_the_longest_sequence_in_each_place() -> None:
    assert largest_lengths(_plan(64, micro_batch_size=4), 300) == (300,) * 4
    assert largest_lengths(_plan(4, ranks=2, micro_batch_size=4), 300) == (300,) * 2


@pytest.mark.parametrize(
    ("size", "longest", "flag", "num_micro_batches"),
    [(64, 250, "--max-tokens-per-gpu", 2), (4, 250, "--max-tokens-per-gpu", 1), (64, 1000, "--rollout-max-response-len", 2)],
)
def test_the_flag_to_lower_is_the_one_that_limits_the_micro_batch(
    size: int, longest: int, flag: str, num_micro_batches: int
) -> None:
    plan = _plan(size, use_dynamic_batch_size=True, max_tokens_per_gpu=1000)
    recomputing = TrainingConfig(gradient_checkpointing=True)
    limit = Longest(num_tokens=longest, flag="--rollout-max-response-len")
    probe = MemoryProbe.of(plan, recomputing, limit, temperature=1.0, with_entropy=False, dtype=torch.bfloat16)
    assert (probe.flag, probe.num_micro_batches) == (flag, num_micro_batches)
    assert probe.state_bytes == plan.rank_bytes.device
    # The input of each layer in bfloat16, and float32 logits.
    assert probe.activation_bytes == 36 * 1000 * 2560 * 2 + 1000 * 151_936 * 4


def test_a_rank_keeps_its_share_of_layers_and_logits_for_each_stage() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=2)
    plan = _plan(6, ranks=12, parallel=parallel, use_dynamic_batch_size=True, max_tokens_per_gpu=1000)
    limit = Longest(num_tokens=999, flag="--rollout-max-response-len")
    training, critic = TrainingConfig(log_probs_chunk_size=300), replace(PROBE)
    options = {"temperature": 0.5, "with_entropy": True, "engine_bytes": 7, "of_critic": critic}
    probe = MemoryProbe.of(plan, training, limit, **options, dtype=torch.bfloat16)
    assert probe.lengths == (999, 999, 2) and probe.num_micro_batches == 2
    kept = kept_bytes(QWEN3_4B, 1000, Keep.ALL, torch.bfloat16) * 2 // 6
    assert probe.activation_bytes == kept + 300 * 4 * 151_936 // 2
    assert {name: getattr(probe, name) for name in options} == options and probe.vocab_size == 151_936
    plan = _plan(60, ranks=12, parallel=parallel, use_dynamic_batch_size=True, max_tokens_per_gpu=1000)
    assert MemoryProbe.of(plan, training, limit, **options, dtype=torch.bfloat16).num_micro_batches == 3


def test_on_a_gpu_the_peak_of_all_ranks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device, calls = torch.device("cuda", 1), list[object]()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda given: calls.append(("reset", given)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda given: (5 << 30) if given == device else 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda given: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: calls.append(devices) or nullcontext())

    def forward_backward(micro_batches: list[object], loss: object, **options: object) -> None:
        calls.append((len(micro_batches), loss, options["temperature"], options["with_entropy"], options["after_each"]()))

    budget = SimpleNamespace(predict=lambda *sizes, free: calls.append((*sizes, free)) or (9 << 30))
    trainer = SimpleNamespace(
        device=device,
        activation_budget=budget,
        prepare_steps=lambda: None,
        forward_backward=forward_backward,
        drop_gradients=lambda: None,
        max_over_ranks=lambda value: 2 * value,
    )
    text = replace(PROBE, engine_bytes=1 << 30, temperature=0.7).run(trainer, None)
    assert " s and at most 10 of 80 GiB; predicted 8 GiB of" in text and text.endswith(" = 18 GiB")
    assert calls == [("reset", device), [device], (2, _loss, 0.7, True, None), ("reset", device), (21, 18, 71 << 30)]


def test_a_probe_computes_gradients_and_drops_them() -> None:
    trainer = TableTrainer(_table())
    random_state = torch.get_rng_state()
    text = PROBE.run(trainer, None)
    assert trainer.calls == ["prepare_steps", "forward_backward", "drop_gradients"]
    assert trainer.num_micro_batches == [2]
    assert trainer.table.grad is None
    assert torch.equal(trainer.table, _table())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert text.startswith("memory probe: a micro-batch of 21 tokens (3 sequences, the longest of 9) took ")
    assert text.endswith("8 GiB of weights, gradients and optimizer state + 3 GiB of activations and logits = 11 GiB")


def test_a_trainer_that_keeps_what_fits_predicts_what_it_keeps() -> None:
    trainer = TableTrainer(_table())
    trainer.activation_budget = ActivationBudget(
        architecture=QWEN3_4B, param_dtype=torch.bfloat16, head_chunk_tokens=2**20, recomputes=True
    )
    kept, logits = 36 * 21 * 2560 * 2, 18 * 151_936 * 4
    assert PROBE.run(trainer, None).endswith(f" + {(kept + logits) / 2**30:.3g} GiB of activations and logits = 8.01 GiB")


def test_an_engine_in_the_process_adds_its_own_weights() -> None:
    assert (
        replace(PROBE, engine_bytes=5 << 30)
        .run(TableTrainer(_table()), None)
        .endswith(
            "8 GiB of weights, gradients and optimizer state + 5 GiB of the engine's own weights + 3 GiB of activations and "
            "logits = 16 GiB"
        )
    )


def test_the_critic_has_the_device_while_it_is_probed() -> None:
    policy, other = TableTrainer(_table()), TableTrainer(_table())
    PROBE.run(policy, Critic(other, policy))
    passes = ["prepare_steps", "forward_backward", "drop_gradients"]
    assert policy.calls == [*passes, "sleep", "wake"]
    assert other.calls == ["sleep", "wake", *passes, "sleep"]


class _FullTrainer(TableTrainer):
    def forward_backward(self, *inputs: object, **options: object) -> NoReturn:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_too_little_memory_ends_in_one_line_with_the_flag_and_the_bytes() -> None:
    with pytest.raises(TrainingError) as raised:
        replace(PROBE, flag="--micro-batch-size").run(_FullTrainer(_table()), None)
    text = str(raised.value)
    assert "\n" not in text
    assert text.startswith(
        "a micro-batch of 21 tokens (3 sequences, the longest of 9), the largest that the flags allow, does not fit the "
        "memory of a trainer rank: predicted 8 GiB of weights, gradients and optimizer state + 3 GiB of activations and "
        "logits = 11 GiB, the device has "
    )
    assert 0.5 < float(text.partition("the device has ")[2].split()[0]) < 10**5
    assert text.endswith(
        " GiB; lower --micro-batch-size. If no rollout becomes so large, --no-memory-probe starts without the check."
    )


def test_every_trained_position_gives_its_score_and_its_entropy_a_gradient() -> None:
    scores, entropy = (torch.zeros(3, requires_grad=True) for _ in range(2))
    found = _loss(scores, entropy, SimpleNamespace(loss_mask=torch.tensor([True, False, True])))
    found.loss.backward()
    assert scores.grad.tolist() == entropy.grad.tolist() == [1.0, 0.0, 1.0]
    assert found.metrics == {}
