"""What lies between two products of a layer, for autograd: forwards and backwards of `models.decoder`, one kernel each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwench.models.decoder.gradients import Heads, QkNorms
from qwench.training.packed_decoder import kernels_on


def split_heads(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, *, heads: Heads, table: Tensor, positions: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed and rotated queries [t, H, K] and keys [t, G, K], and values [t, G, K].

    Args:
        qkv: [t, (H + 2 G) * K]; the values are a view of it.
        q_norm: [K], or None where the model has no such norms.
        table: see `qk_norm_rope`.
    """
    parts: tuple[Tensor, Tensor, Tensor] = _SplitHeads.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        qkv, q_norm, k_norm, heads, table, positions, eps
    )
    return parts


def gated(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [t, F], of both side by side, [t, 2 F]."""
    activated: Tensor = _Gated.apply(gate_up)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return activated


class _SplitHeads(torch.autograd.Function):
    """Keeps the product alone."""

    @staticmethod
    def forward(
        ctx: Any,  # torch's context object takes any attribute
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        heads: Heads,
        table: Tensor,
        positions: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        norms = _norms(q_norm, k_norm)
        query, key = kernels_on(qkv.device)[1].qk_norm_rope(qkv, heads, norms, table, positions, eps)
        ctx.save_for_backward(qkv, table, positions)
        ctx.norms, ctx.heads, ctx.eps = norms, heads, eps
        return query, key, heads.values(qkv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, table, positions = ctx.saved_tensors
        norms, contiguous = ctx.norms, tuple(grad.contiguous() for grad in grads)
        backwards = kernels_on(qkv.device)[1]
        grad = backwards.qk_norm_rope_backward(qkv, ctx.heads, norms, table, positions, contiguous, ctx.eps)
        sums = (None, None) if norms is None else (norms.q_sum.to(qkv.dtype), norms.k_sum.to(qkv.dtype))
        return grad, *sums, None, None, None, None


class _Gated(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        activated: Tensor = kernels_on(gate_up.device)[0].silu_mul(*gate_up.chunk(2, dim=-1))
        return activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up: Tensor = kernels_on(grad.device)[1].silu_mul_backward(gate_up, grad.contiguous(), recompute=False)[0]
        return grad_gate_up


def _norms(q_norm: Tensor | None, k_norm: Tensor | None) -> QkNorms | None:
    """Return the norms with sums of their gradients that are zero."""
    if q_norm is None or k_norm is None:
        return None
    sums = torch.zeros((2, len(q_norm)), dtype=torch.float32, device=q_norm.device)
    return QkNorms(q_weight=q_norm, k_weight=k_norm, q_sum=sums[0], k_sum=sums[1])
