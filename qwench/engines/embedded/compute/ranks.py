"""The ranks of one engine: what each holds of the model, and the collectives between them.

Tensor parallelism, with the example of 2 ranks, D hidden elements, F of the MLP, H heads of K elements and V tokens:

    embedding [V/2, D]  tokens of other ranks give 0, all-reduce
    q, k, v   [H K/2, D]  each rank has half of the heads and their KV cache        o     [D, H K/2]  all-reduce
    gate, up  [F/2, D]                                                              down  [D, F/2]    all-reduce
    head      [V/2, D]  all-gather of the logits: every rank has all of them

The sums after o and down of few rows are one kernel with the norm that follows; see `peer_sums`.

Source: Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from qwench.wire.weight_group import backend_for, make_group

if TYPE_CHECKING:
    from qwench.engines.embedded.compute.peer_sums import PeerSums

COLLECTIVE_TIMEOUT_S = 600.0
_CUT_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_CUT_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The part of a model that one rank holds."""

    rank: int = 0
    size: int = 1
    """Ranks of the engine."""

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Return the part of a weight: a view, or zeros for a bias that another rank adds."""
        module, _, leaf = name.rpartition(".")
        projection = module.rpartition(".")[2]
        if self.size == 1 or projection not in (*_CUT_ROWS, *_CUT_COLUMNS):
            return tensor
        if projection in _CUT_ROWS:
            return tensor.chunk(self.size)[self.rank]
        if leaf == "bias":
            return tensor if self.rank == 0 else torch.zeros_like(tensor)
        return tensor.chunk(self.size, dim=1)[self.rank]


class RankGroup:
    """The process group of one engine's ranks. Every rank calls the same methods in the same order."""

    def __init__(self, store: dist.Store, *, shard: Shard, device: torch.device) -> None:
        """Join; on gloo this waits for all ranks, on NCCL the first collective does."""
        self.shard = shard
        self._device = device
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        self._group = make_group(backend_for(device), dist.PrefixStore("ranks/", store), shard.rank, shard.size, timeout)
        self._leaving, self._has_left = threading.Lock(), False
        self.peers: PeerSums | None = None
        """Sums of few rows without NCCL. None: the GPUs do not reach each other's memory, or there are none."""

    def share_memory(self, pipes: list[Connection], *, hidden_size: int, dtype: torch.dtype) -> None:
        """Let GPUs that reach each other's memory add up few rows without NCCL; every rank calls this.

        Args:
            pipes: of rank 0 to ranks 1 and on, of the others to rank 0.

        Raises:
            EngineError: a rank did not take part.
        """
        if self._device.type == "cuda":
            from qwench.engines.embedded.compute import peer_sums  # noqa: PLC0415  # Triton comes with CUDA only

            self.peers = peer_sums.join(
                pipes, rank=self.shard.rank, size=self.shard.size, hidden_size=hidden_size, dtype=dtype, device=self._device
            )

    def add_up(self, partial: Tensor) -> Tensor:
        """Replace a tensor by the sum over all ranks, and return it."""
        self._group.allreduce(partial).wait()
        return partial

    def gather_columns(self, part_NV: Tensor) -> Tensor:
        """Return the columns [N, V] of all ranks, from the [N, V / size] of each."""
        num_rows, width = part_NV.shape
        if num_rows == 0:
            return part_NV.new_empty((0, self.shard.size * width))
        gathered = part_NV.new_empty(self.shard.size * part_NV.numel())
        self._group._allgather_base(gathered, part_NV.contiguous().view(-1)).wait()
        return gathered.view(self.shard.size, num_rows, width).transpose(0, 1).reshape(num_rows, self.shard.size * width)

    def embed(self, token_ids: Tensor, part_VD: Tensor) -> Tensor:
        """Return the embeddings [T, D] of tokens, of which each rank holds a part of the vocabulary."""
        local = token_ids - self.shard.rank * len(part_VD)
        is_here = (local >= 0) & (local < len(part_VD))
        rows = torch.nn.functional.embedding(local.clamp(0, len(part_VD) - 1), part_VD)
        return self.add_up(torch.where(is_here[:, None], rows, 0))

    def broadcast(self, tensor: Tensor) -> None:
        """Give every rank the tensor of rank 0, in place."""
        self._group.broadcast(tensor, 0).wait()

    def abort(self) -> None:
        """Make collectives that wait for a rank raise, and leave; any thread may call it, and only the first call does so.

        Two threads do where a rank has just ended while the engine is closed, and PyTorch's groups take no lock.
        """
        with self._leaving:
            if self._has_left:
                return
            self._has_left = True
            if self.peers is not None:
                self.peers.give_up()
            self._group.abort()
