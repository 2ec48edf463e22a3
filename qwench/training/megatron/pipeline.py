"""Running micro-batches through the stages by megatron-core's schedules. Every stage gets the last stage's results.

Every rank of a tensor-, context- and pipeline-parallel group brings the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from qwench.algorithms.columns import MicroBatch
from qwench.training.megatron.groups import is_last_stage
from qwench.training.megatron.model import TokenScores


def score(
    model: DistributedDataParallel, micro_batches: Sequence[MicroBatch], *, temperature: float, with_entropy: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return log-probs and, on request, entropy [T] float32 of each micro-batch on the CPU, without gradient; collective."""
    found = run(model, micro_batches, _keep_scores, temperature=temperature, with_entropy=with_entropy, forward_only=True)
    lengths = [micro_batch.num_tokens for micro_batch in micro_batches]
    shape = (1 + with_entropy, sum(lengths))
    scored = torch.cat(found, dim=1) if is_last_stage() else torch.empty(shape, device=_device(model))
    log_probs, *entropy = (list(column.split(lengths)) for column in broadcast_from_last_stage(scored).cpu())
    return log_probs, entropy[0] if entropy else None


def broadcast_from_last_stage(values: Tensor) -> Tensor:
    """Broadcast the last stage's `values` in place; shape and dtype are the same on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return values


def broadcast_names_from_last_stage(names: Sequence[str]) -> list[str]:
    """Give every stage the last one's names."""
    box = [list(names)]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(box, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return box[0]


def run(
    model: DistributedDataParallel,
    micro_batches: Sequence[MicroBatch],
    judge: Callable[..., Any],
    *,
    temperature: float,
    with_entropy: bool,
    forward_only: bool,
    before_each: Callable[[int], None] = lambda index: None,
) -> list[Any]:
    """Send the micro-batches through the pipeline and return what `judge(micro_batch, scores)` keeps on the last stage.

    Args:
        before_each: called before the forward of each micro-batch of this stage, by its place.
    """
    places = count()

    def forward_step(batches: Iterator[MicroBatch], stage: DistributedDataParallel) -> tuple[Any, Callable[..., Any]]:
        micro_batch = next(batches)
        before_each(next(places))
        output = stage(micro_batch, temperature=temperature, with_entropy=with_entropy)
        return output, partial(judge, micro_batch)

    model.config.finalize_model_grads_func = _sum_gradients
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        # With variable_seq_lengths the stages tell each other the shapes; these two are not used.
        seq_length=micro_batches[0].num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return list(found)


def _keep_scores(_micro_batch: MicroBatch, scores: TokenScores, *, non_loss_data: bool) -> Tensor:
    """Return [1 or 2, T]: log-probs and, where it was computed, entropy."""
    assert non_loss_data, "scoring has no loss"
    return torch.stack([scores.log_probs] if scores.entropy is None else [scores.log_probs, scores.entropy])


def _sum_gradients(models: Sequence[DistributedDataParallel], _num_tokens: Tensor | None = None, **groups: Any) -> None:
    """Sum over ranks without dividing by tokens: losses arrive divided by the step's global counts already."""
    finalize_model_grads(models, None, **groups)  # the schedule's own keywords, passed on


def _device(model: DistributedDataParallel) -> torch.device:
    parameter: Tensor = next(model.parameters())
    return parameter.device
