"""Gradients of the element-wise parts of a decoder layer in plain PyTorch: the reference, and the code for CPUs.

`gradients_triton` has the same functions as one kernel each. The forwards are those of `elementwise`; only queries and keys,
which training stores in no cache, have one here. Every gradient of a weight is added to a float32 sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qwench.models.decoder.rope import rotate


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """How a fused projection [T, (heads + 2 kv_heads) K] is divided."""

    heads: int
    kv_heads: int
    head_dim: int
    grouped: bool = False
    """Each key and its value follow the queries that read them (Megatron). False: all queries, all keys, all values."""

    def values(self, qkv: Tensor) -> Tensor:
        """Return a view [T, kv_heads, K] of the values."""
        last = qkv if self.grouped else qkv[:, -self.kv_heads * self.head_dim :]
        values: Tensor = last.unflatten(-1, (self.kv_heads, -1, self.head_dim))[:, :, -1]
        return values

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [T, heads, K], keys and values [T, kv_heads, K]; grouped queries are a copy."""
        if self.grouped:
            groups = qkv.unflatten(-1, (self.kv_heads, -1, self.head_dim))
            return groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return q, k, v

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Undo `split`."""
        if self.grouped:
            parts = (q.unflatten(1, (self.kv_heads, -1)), k.unsqueeze(2), v.unsqueeze(2))
            return torch.cat(parts, dim=2).flatten(1)
        return torch.cat((q, k, v), dim=1).flatten(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class QkNorms:
    """Weights [K] of the norms of queries and keys, and where their gradients are summed."""

    q_weight: Tensor
    k_weight: Tensor
    q_sum: Tensor
    k_sum: Tensor


def rms_norm_backward(
    x_TD: Tensor, weight_D: Tensor, grad_TD: Tensor, residual_TD: Tensor | None, weight_sum_D: Tensor, eps: float
) -> Tensor:
    """Return the gradient of x, plus `residual_TD`, from that of its norm; add the weight's to `weight_sum_D`."""
    grad_x, grad_weight = _norm_gradients(x_TD.float(), weight_D.float(), grad_TD.float(), eps)
    weight_sum_D += grad_weight.flatten(0, -2).sum(0)
    if residual_TD is not None:
        grad_x += residual_TD.float()
    return grad_x.to(x_TD.dtype)


def qk_norm_rope(
    qkv: Tensor, heads: Heads, norms: QkNorms | None, rope_table: Tensor, positions: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return normed and rotated queries [T, H, K] and keys [T, kv_heads, K].

    Args:
        qkv: [T, (H + 2 kv_heads) K], divided as `heads` says.
        rope_table: [positions, K], cosines beside sines, in the dtype of `qkv`.
        positions: [T]
    """
    q, k, _ = heads.split(qkv)
    if norms is not None:
        q = functional.rms_norm(q, norms.q_weight.shape, norms.q_weight, eps)
        k = functional.rms_norm(k, norms.k_weight.shape, norms.k_weight, eps)
    cos, sin = rope_table[positions].unsqueeze(1).chunk(2, dim=-1)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def qk_norm_rope_backward(
    qkv: Tensor,
    heads: Heads,
    norms: QkNorms | None,
    rope_table: Tensor,
    positions: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    eps: float,
) -> Tensor:
    """Return the gradient of `qkv` from those of rotated queries, rotated keys and values; add the weights' to their sums."""
    cos, sin = rope_table[positions].unsqueeze(1).chunk(2, dim=-1)
    back = [rotate(grad.float(), cos.float(), -sin.float()) for grad in grads[:2]]
    if norms is not None:
        q, k, _ = (part.float() for part in heads.split(qkv))
        for i, (x, weight, total) in enumerate(((q, norms.q_weight, norms.q_sum), (k, norms.k_weight, norms.k_sum))):
            back[i], grad_weight = _norm_gradients(x, weight.float(), back[i], eps)
            total += grad_weight.flatten(0, -2).sum(0)
    return heads.join(*(part.to(qkv.dtype) for part in (*back, grads[2])))


def silu_mul_backward(gate_up_T2F: Tensor, grad_TF: Tensor, *, recompute: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return the gradient [T, 2 F] of gate and up side by side and, where it was not kept, silu(gate) * up again."""
    gate, up = gate_up_T2F.float().chunk(2, dim=-1)
    grad = grad_TF.float()
    sigmoid = gate.sigmoid()
    activated = gate * sigmoid
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dtype = gate_up_T2F.dtype
    again = activated.to(dtype) * up.to(dtype) if recompute else None
    return torch.cat([grad_gate, grad * activated], dim=-1).to(dtype), again


def _norm_gradients(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and, for each row still, of the weight; float32.

    With n = x / rms(x) and y = w n: dx = (w dy - n mean(w dy n)) / rms(x) and dw = dy n.
    """
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = x * scale
    slope = weight * grad
    return scale * (slope - normed * (slope * normed).mean(-1, keepdim=True)), grad * normed
