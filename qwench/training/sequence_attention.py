"""Attention with a written-out backward for the sequences of one micro-batch (`training.packed_decoder.Attention`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwench.training import cudnn_attention
from qwench.training.packed_attention import PackedAttention
from qwench.training.packed_decoder import Attention


class AutogradAttention:
    """Attention by any function that autograd can differentiate; its graph is what is saved."""

    def __init__(self, attend: PackedAttention) -> None:
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


def attention_of(implementation: str, lengths: Sequence[int], device: torch.device) -> Attention:
    """Return the attention that `--attn-implementation` names, for sequences of these lengths."""
    if implementation == "cudnn":
        return cudnn_attention.CudnnAttention(lengths, device)
    return AutogradAttention(PackedAttention(lengths, lengths, varlen=implementation == "varlen", device=device))
