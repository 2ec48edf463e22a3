"""Muon on megatron-core's shards: every rank has the update of a matrix whole, and keeps its own range of it.

flat ranges --all-reduce over DP x CP--> this rank's rows or columns --all-gather over TP--> whole Megatron tensor
            --> q, k, v, gate and up apart --Newton-Schulz--> whole Megatron tensor --> this rank's range
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.models.megatron_names import WeightRule, to_hf, to_megatron, tp_join, tp_shard
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.megatron.weights import tensor_parallel_shards
from qwench.training.optimizers.muon import Muon, takes


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixShard:
    """This rank's range of a matrix."""

    rule: WeightRule
    weight: nn.Parameter
    """The rows or columns of this tensor-parallel rank."""
    values: Tensor | None
    """Flat, what the optimizer steps. None: other ranks have all of it."""
    start: int = 0
    """Of the range in the flattened weight."""


class ShardedMuon(Muon):
    """See the module docstring. Steps are collective over DP x CP and TP."""

    def __init__(
        self, shards: Sequence[MatrixShard], section: OptimizerConfig, *, place: TensorPlace, group: dist.ProcessGroup
    ) -> None:
        """Take the matrices of this stage in the order of the model; `group` holds the ranks that share them."""
        super().__init__([{"params": []}], section, splits_masters=False)
        # torch takes no views of weights in the constructor; megatron-core, too, puts them in afterwards.
        self.param_groups[0]["params"] = [shard.values for shard in shards if shard.values is not None]
        self._shards, self._place, self._group = shards, place, group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # see HostAdam
        """Update masters, momenta and parameters by the gradients. See `Muon`."""
        assert closure is None, "gradients are computed before the step"
        self._count_steps(int(self._num_steps) + 1)
        for shard in self._shards:
            values = shard.values
            update = self._whole_update(shard, None if values is None else self._sum(values))
            if values is not None:
                self._move(values, update[shard.start : shard.start + len(values)])

    def _whole_update(self, shard: MatrixShard, values: Tensor | None) -> Tensor:
        """Return the flattened update of this tensor-parallel rank's part. All ranks join, also those without a range."""
        rule, place = shard.rule, self._place
        part = torch.zeros(shard.weight.shape, dtype=torch.float32, device=shard.weight.device)
        if values is not None:
            part.view(-1)[shard.start : shard.start + len(values)] = values
        dist.all_reduce(part, group=self._group)
        whole = tp_join(rule, tensor_parallel_shards(part, rule))
        updates = [self._orthogonal(matrix) for matrix in to_hf(rule, whole, place.model).values()]
        return tp_shard(rule, to_megatron(rule, updates, place.model), place.tp_rank, place.tp_size).reshape(-1)


def trained_matrices(weights: Sequence[tuple[WeightRule, nn.Parameter]]) -> dict[nn.Parameter, WeightRule]:
    """Return the weights that Muon steps. megatron-core's optimizer takes no frozen ones."""
    return {weight: rule for rule, weight in weights if weight.requires_grad and takes(rule.hf_names[0], weight)}
