"""Attention with a written-out backward for the sequences of one micro-batch (`training.packed_decoder.Attention`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwench.models.decoder.invariant import KEY_BLOCK, TILE, attend
from qwench.training import cudnn_attention
from qwench.training.packed_attention import PackedAttention
from qwench.training.packed_decoder import Attention


class AutogradAttention:
    """Attention by any function that autograd can differentiate; its graph is what is saved."""

    def __init__(self, attend: PackedAttention | _InvariantSequences) -> None:
        self._attend = attend

    def forward(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, *, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return [T, H, K], and the leaves and the result of a graph."""
        with torch.enable_grad():
            leaves = tuple(tensor.detach().requires_grad_() for tensor in (q_THK, k_THK, v_THK))
            output = self._attend(*leaves, scale=scale)
        return output.detach(), (*leaves, output)

    def backward(
        self,
        grad_THK: Tensor,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THK: Tensor,
        output_THK: Tensor,
        saved: tuple[Tensor, ...],
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries, keys and values."""
        *leaves, output = saved
        q, k, v = torch.autograd.grad(output, leaves, grad_THK)
        return q.contiguous(), k.contiguous(), v.contiguous()


class _InvariantSequences:
    """Attention inside packed sequences in tiles (`models.decoder.invariant`)."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        longest = -(-max(lengths) // KEY_BLOCK) * KEY_BLOCK
        rows, last_seen, keys, start = list[Tensor](), list[Tensor](), list[Tensor](), 0
        for length in lengths:
            place = torch.arange(-(-length // TILE) * TILE).clamp(max=length - 1).view(-1, TILE)
            rows.append(start + place)
            last_seen.append(place)
            keys.append((start + torch.arange(longest).clamp(max=length - 1)).expand(len(place), -1))
            start += length
        self._rows, self._last_seen, self._keys = (torch.cat(parts).to(device) for parts in (rows, last_seen, keys))
        real = [torch.arange(-(-length // TILE) * TILE) < length for length in lengths]
        self._cells = torch.cat(real).nonzero().squeeze(-1).to(device)

    def __call__(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, *, scale: float) -> Tensor:
        """Return [T, H, K]."""
        tiles = attend(q_THK[self._rows], k_THK[self._keys], v_THK[self._keys], self._last_seen, scale=scale)
        return tiles.flatten(0, 1)[self._cells]


def attention_of(implementation: str, lengths: Sequence[int], device: torch.device, *, invariant: bool = False) -> Attention:
    """Return the attention that `--attn-implementation` names, for sequences of these lengths.

    Args:
        invariant: a sequence has the same bits in every micro-batch.
    """
    if invariant:
        return AutogradAttention(_InvariantSequences(lengths, device))
    if implementation == "cudnn":
        return cudnn_attention.CudnnAttention(lengths, device)
    return AutogradAttention(PackedAttention(lengths, lengths, varlen=implementation == "varlen", device=device))
