"""Runs our megatron-core model in many layouts on four gloo ranks, all in one launch.

Every rank leaves `<case>.<rank>.pt` in the folder: its place, the scores if it has them, and its own gradients, not reduced.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from qwench.algorithms.columns import MicroBatch
from qwench.checkpoints.formats.sources import open_weights
from qwench.config.layout import ParallelLayout, check_layout
from qwench.config.sections.training import TrainingConfig
from qwench.models.hf import architecture_of, load_hf_config
from qwench.training.batch import idle
from qwench.training.megatron.groups import is_first_stage, is_last_stage, join_groups
from qwench.training.megatron.model import (
    PolicyModel,
    TokenScores,
    build_model,
    load_weights,
    local_parameters,
    tied_head,
)
from tests.contract import train_backend_cases as batches
from tests.contract.rank_processes import CPU, joined, run_ranks
from tests.deadlines import patient
from tests.fakes import cuda_stand_in

WORLD_SIZE = 4
TEMPERATURE = 0.8
_TIMEOUT_S = patient(270)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in a layout."""

    model: str
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    recompute: str | None = None
    modules: tuple[str, ...] = ("core_attn",)

    @property
    def name(self) -> str:
        """Return for example tied-tp2-sp-recompute-full-core_attn."""
        sizes = [f"{key}{getattr(self.layout, key)}" for key in ("tp", "pp", "cp") if getattr(self.layout, key) > 1]
        flags = ["sp"] * self.layout.sequence_parallel
        flags += [] if self.recompute is None else ["recompute", self.recompute, *self.modules]
        return "-".join([self.model, *sizes, *flags])


def _sp(**sizes: int) -> ParallelLayout:
    return ParallelLayout(**sizes, sequence_parallel=True)


CASES = [
    Case(model="tied", layout=_sp(tp=2)),
    Case(model="tied", layout=ParallelLayout(pp=2)),
    Case(model="tied", layout=ParallelLayout(pp=4)),
    Case(model="tied", layout=ParallelLayout(cp=2)),
    Case(model="tied", layout=_sp(tp=2, pp=2)),
    Case(model="tied", layout=_sp(tp=2, cp=2)),
    Case(model="untied"),
    Case(model="untied", layout=ParallelLayout(tp=2)),
    Case(model="untied", layout=ParallelLayout(cp=4)),
    Case(model="untied", layout=ParallelLayout(pp=2, cp=2)),
    Case(model="qwen2", layout=ParallelLayout(tp=2, cp=2)),
    Case(model="qwen2", layout=_sp(tp=2, pp=2)),
    Case(model="tied", layout=_sp(tp=2, pp=2), recompute="full"),
    Case(model="tied", layout=ParallelLayout(tp=2, cp=2), recompute="selective"),
    Case(model="untied", layout=_sp(tp=2, pp=2), recompute="selective", modules=("core_attn", "mlp")),
]
"""Each layout once, tied where a head is copied; `test_train_backend_megatron` steps with untied embeddings in every layout."""


def micro_batches() -> list[MicroBatch]:
    """Return packed sequences of 2 to 11 tokens, and a micro-batch in which nothing is trained on."""
    batch = batches.make_batch()
    return [*batches.micro_batches(batch, [[6, 1], [7, 3, 0, 5], [2, 4]]), idle(batch)]


def slopes(micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the gradients [T] of the log-probs and entropies that tests start from."""
    draw = torch.Generator().manual_seed(micro_batch.num_tokens)
    first, second = torch.randn(2, micro_batch.num_tokens, generator=draw)
    return first, second


def run_cases(folder: Path) -> None:
    """Run every case on all ranks."""
    run_ranks(_run_rank, [(rank, folder) for rank in range(WORLD_SIZE)], folder=folder, timeout_s=_TIMEOUT_S)


def _run_rank(rank: int, folder: Path) -> None:
    cuda_stand_in.install()
    torch.set_num_threads(1)
    for case in CASES:
        with joined(rank, WORLD_SIZE, folder / f"{case.name}.store", timeout_s=_TIMEOUT_S):
            torch.save(_run_case(case, folder), folder / f"{case.name}.{rank}.pt")
            parallel_state.destroy_model_parallel()


def _run_case(case: Case, folder: Path) -> dict[str, object]:
    architecture = architecture_of(load_hf_config(folder / case.model))
    check_layout(case.layout, architecture, world_size=WORLD_SIZE)
    parallel = join_groups(case.layout, timeout_s=_TIMEOUT_S)
    training = TrainingConfig(
        recompute_granularity=case.recompute,  # type: ignore[arg-type]  # written above
        recompute_modules=case.modules,
        log_probs_chunk_size=7,
    )
    with _warnings() as warnings:
        model = build_model(architecture, case.layout, training, CPU, param_dtype=torch.float32)
    load_weights(model, open_weights(folder / case.model, architecture), architecture, case.layout)
    scores = [_forward_and_backward(model, micro_batch) for micro_batch in micro_batches()]
    parameters = [(rule.megatron_name, weight) for rule, weight in local_parameters(model, architecture)]
    parameters += [("copied head", weight) for _, weight in tied_head(model, architecture)]
    return {
        "warnings": warnings,
        "recomputed": [_recomputed(layer) for layer in model.decoder.layers],
        "place": {
            "tp": parallel_state.get_tensor_model_parallel_rank(),
            "pp": parallel_state.get_pipeline_model_parallel_rank(),
            "cp": parallel_state.get_context_parallel_rank(),
            "dp": parallel.dp_rank,
        },
        "parallel": parallel,
        "scores": [score for score in scores if score is not None],
        "gradients": {name: weight.grad for name, weight in parameters},
    }


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Note what megatron-core logs at WARNING and above."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def _recomputed(layer: TransformerLayer) -> set[str]:
    """Return what megatron-core recomputes of a layer."""
    parts = {
        "core_attn": layer.self_attention.checkpoint_core_attention,
        "mlp": layer.recompute_mlp,
    }
    return {name for name, is_recomputed in parts.items() if is_recomputed}


def _forward_and_backward(model: PolicyModel, micro_batch: MicroBatch) -> TokenScores | None:
    """Do by hand what a pipeline schedule does for one micro-batch; the last stage returns the scores."""
    stage_input = None if is_first_stage() else _receive_from(parallel_state.get_pipeline_model_parallel_prev_rank())
    if stage_input is not None:
        model.set_input_tensor([stage_input.requires_grad_()])
    output = model(micro_batch, temperature=TEMPERATURE, with_entropy=True)
    if is_last_stage():
        of_log_probs, of_entropy = slopes(micro_batch)
        (of_log_probs @ output.log_probs + of_entropy @ output.entropy).backward()
    else:
        neighbour = parallel_state.get_pipeline_model_parallel_next_rank()
        _send_to(neighbour, output.detach())
        output.backward(_receive_from(neighbour))
    if stage_input is not None:
        assert stage_input.grad is not None
        _send_to(parallel_state.get_pipeline_model_parallel_prev_rank(), stage_input.grad)
    return TokenScores(log_probs=output.log_probs.detach(), entropy=output.entropy.detach()) if is_last_stage() else None


def _send_to(rank: int, values: Tensor) -> None:
    dist.send(torch.tensor(values.shape), rank)
    dist.send(values.contiguous(), rank)


def _receive_from(rank: int) -> Tensor:
    shape = torch.empty(3, dtype=torch.int64)
    dist.recv(shape, rank)
    values = torch.empty(shape.tolist())
    dist.recv(values, rank)
    return values
