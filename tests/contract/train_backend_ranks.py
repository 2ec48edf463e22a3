"""Runs backends on groups of ranks for the contract suite: one process per rank, all cases of a world in one launch.

Ranks are on the CPU and speak gloo, or have a GPU each and speak NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from qwench.algorithms.columns import MicroBatch, TokenLoss
from qwench.config.layout import ParallelLayout
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import TrainingError
from qwench.training.batch import unpack
from qwench.training.fsdp.fsdp_trainer import WHOLE_GRADIENT_BYTES, FsdpTrainer
from qwench.training.megatron.megatron_trainer import MegatronTrainer
from qwench.training.reference import BaseModel, FrozenTeacher, Reference
from qwench.training.trainer import Scorer, Trainer
from qwench.wire.portions import WeightPart
from tests.contract import train_backend_cases as cases
from tests.contract.rank_processes import CPU, joined, run_ranks
from tests.deadlines import patient
from tests.fakes import cuda_stand_in
from tests.fakes.sections import offloaded
from tests.fakes.trainer import take_step

_TIMEOUT_S = patient(300)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to cut and place the same batch."""

    name: str
    model: str
    bins: list[list[list[int]]]
    """Of each data-parallel rank, of each micro-batch: positions in the batch."""
    backend: str = "fsdp"
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Of the Megatron backend."""
    dp_replicate: int = 1
    gradient_checkpointing: bool = False
    recompute_modules: tuple[str, ...] = ()
    bf16: bool = False
    """Compute in bfloat16, not in float32."""
    offload_fraction: float = 0.0
    reduce_every_micro_batch: bool = False
    whole_weights: bool = False
    non_finite: bool = False
    """Give one rank's last micro-batch a loss of NaN instead."""
    probe: bool = False
    """Run the memory probe before the steps."""
    save: bool = False
    """Save after the steps, under `<case>.checkpoint`."""
    load: str = ""
    """Load the checkpoint of this case first, and step on from there."""
    weights_only: bool = False
    """Load without the optimizer."""
    num_steps: int = cases.NUM_STEPS
    lora: LoraConfig | None = None
    """Train adapters, whose reference is the model without them."""
    teacher: str = ""
    """Another model, in the place of the frozen one, scores before the steps."""


@contextmanager
def build_fsdp(model_folder: Path, case: Case, device: torch.device = CPU) -> Iterator[Trainer]:
    """Build the FSDP2 backend with the constants of the plain loop."""
    yield FsdpTrainer.build(
        model_folder,
        training=_training(case),
        optimizer=_optimizer(case),
        total_steps=cases.NUM_STEPS,
        param_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        device=device,
        dp_replicate=case.dp_replicate,
        lora=case.lora,
        whole_gradient_bytes=0 if case.reduce_every_micro_batch else WHOLE_GRADIENT_BYTES,
    )


@contextmanager
def build_megatron(model_folder: Path, case: Case, device: torch.device = CPU) -> Iterator[Trainer]:
    """Build the Megatron backend with the constants of the plain loop, and leave its groups afterwards."""
    if device.type == "cpu":
        cuda_stand_in.install()
    yield MegatronTrainer.build(
        model_folder,
        training=_training(case),
        optimizer=_optimizer(case),
        total_steps=cases.NUM_STEPS,
        layout=case.layout,
        param_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        device=device,
        collective_timeout_s=_TIMEOUT_S,
        lora=case.lora,
    )
    parallel_state.destroy_model_parallel()


BUILDERS: dict[str, Callable[[Path, Case, torch.device], AbstractContextManager[Trainer]]] = {
    "fsdp": build_fsdp,
    "megatron": build_megatron,
}
"""Another backend joins the suite by a line here."""


def run_world(world_size: int, cases_of_world: list[Case], folder: Path, *, device_type: str = "cpu") -> None:
    """Run the cases on `world_size` ranks; rank r leaves its records in `<case>.<r>.pt`."""
    devices = [torch.device(device_type, rank) if device_type == "cuda" else CPU for rank in range(world_size)]
    ranks = [(rank, world_size, cases_of_world, folder, device) for rank, device in enumerate(devices)]
    run_ranks(_run_rank, ranks, folder=folder, timeout_s=_TIMEOUT_S)


def _run_rank(rank: int, world_size: int, cases_of_world: list[Case], folder: Path, device: torch.device) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for case in cases_of_world:
        store = folder / f"{case.name}.store"
        with joined(rank, world_size, store, timeout_s=_TIMEOUT_S, device=device):
            record = _run_case(case, folder, device)
        torch.save(record, folder / f"{case.name}.{rank}.pt")


def _run_case(case: Case, folder: Path, device: torch.device) -> dict[str, object]:
    with BUILDERS[case.backend](folder / case.model, case, device) as backend:
        return _run_non_finite(backend, case) if case.non_finite else _run_steps(backend, case, folder)


def _run_steps(backend: Trainer, case: Case, folder: Path) -> dict[str, object]:
    if case.load:
        backend.load(folder / f"{case.load}.checkpoint", weights_only=case.weights_only)
    mine = cases.micro_batches(cases.make_batch(case.model), case.bins[backend.parallel.dp_rank])
    reference_model = BaseModel(backend) if backend.has_adapters else Reference(backend)
    if case.probe:
        cases.PROBE.run(backend, None)
    scored, entropy = _log_probs(backend, mine), _entropy(backend, mine)
    teacher = _log_probs(FrozenTeacher(backend, folder / case.teacher), mine) if case.teacher else {}
    reduced_before: list[bool] = []

    def watched_loss(*inputs: object) -> TokenLoss:
        reduced_before.append(_has_gradient_shards(backend))
        return cases.clipped_loss(*inputs)  # type: ignore[arg-type]  # passed on as they came

    steps = [
        take_step(backend, mine, watched_loss, temperature=cases.TEMPERATURE, with_entropy=True) for _ in range(case.num_steps)
    ]
    reference = _log_probs(reference_model, mine)
    if case.save:
        checkpoint = folder / f"{case.name}.checkpoint"
        checkpoint.mkdir(exist_ok=True)
        backend.save(checkpoint)
    return {
        "log_probs": scored,
        "entropy": entropy,
        "reference_log_probs": reference,
        "teacher_log_probs": teacher,
        "steps": [asdict(step) for step in steps],
        "reduced_before": reduced_before,
        "random_state": torch.get_rng_state(),
        "weights": _all_weights(backend),
        "apart": _all_weights(backend, part="apart") if backend.has_adapters else {},
        "summed_ranks": backend.all_reduce_sum(torch.tensor([1.0, backend.parallel.dp_rank])),
        "largest_rank": backend.max_over_ranks(float(dist.get_rank())),
        "parallel": asdict(backend.parallel),
    }


def _log_probs(backend: Scorer, micro_batches: list[MicroBatch]) -> dict[int, torch.Tensor]:
    """Return the log-probs of each sample by its place in the batch."""
    return _by_sample(backend.forward(micro_batches, temperature=cases.TEMPERATURE).log_probs, micro_batches)


def _entropy(backend: Trainer, micro_batches: list[MicroBatch]) -> dict[int, torch.Tensor]:
    """Return the entropy of each sample by its place in the batch."""
    entropy = backend.forward(micro_batches, temperature=cases.TEMPERATURE, with_entropy=True).entropy
    assert entropy is not None
    return _by_sample(entropy, micro_batches)


def _by_sample(packed: list[torch.Tensor], micro_batches: list[MicroBatch]) -> dict[int, torch.Tensor]:
    return {
        index: values
        for micro_batch, column in zip(micro_batches, packed, strict=True)
        for index, values in zip(
            micro_batch.indices, unpack(column, micro_batch, [length - 1 for length in micro_batch.lengths]), strict=True
        )
    }


def _run_non_finite(backend: Trainer, case: Case) -> dict[str, object]:
    """Spoil one rank's last micro-batch, then go on with a good step."""
    mine = cases.micro_batches(cases.make_batch(), case.bins[backend.parallel.dp_rank])
    calls: list[int] = []

    def spoiled(*inputs: object) -> TokenLoss:
        calls.append(1)
        good = cases.clipped_loss(*inputs)  # type: ignore[arg-type]  # passed on as they came
        spoil = backend.parallel.dp_rank == backend.parallel.dp_size - 1 and len(calls) == len(mine)
        return TokenLoss(loss=good.loss * float("nan"), metrics=good.metrics) if spoil else good

    before = _all_weights(backend)
    message = ""
    try:
        take_step(backend, mine, spoiled, temperature=cases.TEMPERATURE, with_entropy=True)
    except TrainingError as error:
        message = str(error)
    after = _all_weights(backend)
    first = take_step(backend, mine, cases.clipped_loss, temperature=cases.TEMPERATURE, with_entropy=True)
    return {"message": message, "before": before, "after": after, "next": asdict(first)}


def _training(case: Case) -> TrainingConfig:
    return TrainingConfig(
        gradient_checkpointing=case.gradient_checkpointing,
        recompute_granularity="selective" if case.recompute_modules else None,
        recompute_modules=case.recompute_modules or ("core_attn",),
        log_probs_chunk_size=7,
        whole_weights=case.whole_weights,
        freeze_params_name_list=cases.FREEZES if case.model == cases.FROZEN else (),
    )


def _optimizer(case: Case) -> OptimizerConfig:
    if case.model == cases.MUON:
        return cases.MUON_OPTIMIZER
    if case.model == cases.STATELESS:
        return offloaded(cases.STATELESS_OPTIMIZER, case.offload_fraction, overlap=True)
    return offloaded(cases.OPTIMIZER, case.offload_fraction, overlap=True)


def _has_gradient_shards(backend: Trainer) -> bool:
    """Tell whether FSDP2 has reduced gradients of earlier micro-batches; before that, they are whole on every rank."""
    return isinstance(backend, FsdpTrainer) and any(weight.grad is not None for weight in backend._weights.values())


def _all_weights(backend: Trainer, *, part: WeightPart = "merged") -> dict[str, torch.Tensor]:
    return {
        name: tensor.cpu().clone() for bucket in backend.weights(bucket_bytes=1 << 14, part=part) for name, tensor in bucket
    }
