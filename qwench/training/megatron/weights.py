"""The stages' tensor-parallel shards as whole tensors under Hugging Face names.

shards --all-gather over tp--> whole Megatron tensor --copies--> Hugging Face tensors --broadcast over pp--> every rank
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from qwench.models.architecture import Architecture
from qwench.models.megatron_names import WeightRule, to_hf, tp_join


class HeldWeight(Protocol):
    """A tensor, or what returns one."""

    @property
    def shape(self) -> torch.Size: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    def detach(self) -> Tensor: ...  # noqa: D102


class WholeWeights:
    """Gathers the weights of all stages, in the order of the model; every rank gets each tensor."""

    def __init__(self, own: Sequence[tuple[WeightRule, HeldWeight]], rules: Sequence[WeightRule], config: Architecture) -> None:
        """Agree on which stage holds which weight; collective over the pipeline.

        Args:
            own: This stage's share. rules: Of all stages' weights, in the order of the model.
        """
        self._config, self._rules = config, rules
        self._own = {rule.megatron_name: weight for rule, weight in own}
        self._group = parallel_state.get_pipeline_model_parallel_group()
        facts = {name: (tuple(weight.shape), weight.dtype) for name, weight in self._own.items()}
        stages: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{} for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(stages, facts, group=self._group)
        self._stage_of = {name: stage for stage, names in enumerate(stages) for name in names}
        self._facts = {name: fact for names in stages for name, fact in names.items()}

    @torch.no_grad()
    def gather(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor, one Megatron tensor at a time; collective over tp and pp."""
        for rule in self._rules:
            yield from to_hf(rule, self._whole(rule), self._config).items()

    def _whole(self, rule: WeightRule) -> Tensor:
        """Return the whole Megatron tensor on every rank."""
        weight = self._own.get(rule.megatron_name)
        whole = (
            self._empty(rule) if weight is None else tp_join(rule, tensor_parallel_shards(weight.detach(), rule)).contiguous()
        )
        if len(set(self._stage_of.values())) > 1:
            source = dist.get_global_rank(self._group, self._stage_of[rule.megatron_name])
            dist.broadcast(whole, src=source, group=self._group)
        return whole

    def _empty(self, rule: WeightRule) -> Tensor:
        (shape, dtype) = self._facts[rule.megatron_name]
        sizes = list(shape)
        if rule.tp_dim is not None:
            sizes[rule.tp_dim] *= parallel_state.get_tensor_model_parallel_world_size()
        return torch.empty(sizes, dtype=dtype, device=next(iter(self._own.values())).device)


def tensor_parallel_shards(shard: Tensor, rule: WeightRule) -> list[Tensor]:
    """Return the shards of all tensor-parallel ranks; collective."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if rule.tp_dim is None or size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(size)]
    dist.all_gather(shards, shard.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return shards
