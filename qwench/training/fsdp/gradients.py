"""Gradients of the shards: float32 sums over micro-batches and ranks, also where the shards themselves are in bfloat16.

FSDP2 reduces in float32, and then rounds the sum to the dtype of the shard. Where that is less than float32, the exact sum is
taken before it is rounded: `set_all_reduce_hook` receives the flat sum of a group of weights. In the hook after accumulation,
the place of the rounded gradient gives the part of its weight. The rounded gradient is dropped at once. (Once FSDP2 honours
`Tensor.grad_dtype`, setting that to float32 replaces this.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Gradients(Protocol):
    """Float32 gradients of a rank's part of the weights, in the order of the weights, since the last `drop`."""

    def local(self) -> Sequence[Tensor]:
        """Return this rank's part of every gradient, float32, on the device."""
        ...

    def drop(self) -> None:
        """Forget the gradients and give their memory back."""
        ...


class ShardedGradients:
    """Gradients of `weights` since the last `drop`, in their order."""

    def __init__(self, policy: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        """Watch the reductions of `policy`, which is sharded already, where its shards are not in float32."""
        self._weights = list(weights.values())
        self._exact: dict[Tensor, Tensor] = {}
        self._reduced: Tensor | None = None
        self._rounds = any(weight.dtype != torch.float32 for weight in self._weights)
        if not self._rounds:
            return
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.set_all_reduce_hook(self._see_reduced)
        for weight in self._weights:
            weight.register_post_accumulate_grad_hook(self._take_exact)

    def local(self) -> Sequence[Tensor]:
        """Return this rank's part of every gradient, float32, on the device."""
        if self._rounds:
            assert len(self._exact) == len(self._weights), "every weight has a reduced gradient"
            return [self._exact[weight] for weight in self._weights]
        gradients = [weight.grad for weight in self._weights]
        assert all(isinstance(gradient, DTensor) for gradient in gradients), "every weight has a reduced gradient"
        return [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]

    def drop(self) -> None:
        """Forget the gradients and give their memory back."""
        self._exact.clear()
        self._reduced = None
        for weight in self._weights:
            weight.grad = None

    def _see_reduced(self, reduced: Tensor) -> None:
        """Remember a group's flat sum, float32; the hooks of its weights follow at once."""
        self._reduced = reduced

    def _take_exact(self, weight: Tensor) -> None:
        assert self._reduced is not None and isinstance(weight.grad, DTensor), "the group's reduction comes first"
        rounded = weight.grad.to_local()
        weight.grad = None
        exact = self._reduced.as_strided(rounded.size(), rounded.stride(), rounded.storage_offset())
        if weight not in self._exact:
            self._exact[weight] = exact
            return
        self._exact[weight] += exact
        if exact.is_cuda:
            # Its memory belongs to the stream of the reduction, and must outlive the sum, which is queued on this one.
            exact.record_stream(torch.cuda.current_stream())
