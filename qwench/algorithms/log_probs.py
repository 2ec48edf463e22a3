"""Log-probs and entropy of labels from hidden states, without ever holding all logits.

Logits of at most `chunk_tokens` positions exist at a time; they are computed once in the forward and once more in the
backward, where the gradient of the head is summed over chunks in float32:

    hidden [T, D] -> chunks [C, D] -> logits [C, V] float32 / temperature -> log-probs [C], entropy [C]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs of `labels`, and on request the entropy of the whole distribution, at `temperature`.

    Args:
        hidden: [T, D], any floating dtype.
        head_weight: [V, D], dtype of `hidden`; see `head_logits` for the product, everything after is float32.
        labels: [T] int64.
        compiled: Fuse the element-wise work of a chunk by torch.compile.

    Returns:
        log-probs [T] float32; entropy [T] float32 or None. Both carry gradients to `hidden` and `head_weight`.
    """
    outputs: tuple[Tensor, Tensor | None] = _ChunkedHead.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        hidden, head_weight, labels, temperature, chunk_tokens, with_entropy, compiled
    )
    return outputs


def head_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Return the logits [T, V] float32 of `hidden` [T, D] and `head_weight` [V, D], without a gradient.

    With CUDA the product of bfloat16 factors is stored as it was accumulated: rounding logits to bfloat16 alone moves log-probs
    by about 0.02 on models whose logits are large. CPU and ROCm have no such product and round.
    """
    if hidden.is_cuda and torch.version.cuda is not None and hidden.dtype != torch.float32:
        return torch.mm(hidden, head_weight.T, out_dtype=torch.float32)
    return (hidden @ head_weight.T).float()


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch's context object carries whatever is set on it
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor | None]:
        chunk_forward = _compile(_chunk_forward) if compiled else _chunk_forward
        outputs = [
            chunk_forward(chunk, weight, chunk_labels, temperature, with_entropy)
            for chunk, chunk_labels in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
        ]
        ctx.save_for_backward(hidden, weight, labels)
        ctx.temperature, ctx.chunk_tokens, ctx.compiled = temperature, chunk_tokens, compiled
        log_probs = torch.cat([log_probs for log_probs, _ in outputs])
        entropy = torch.cat([entropy for _, entropy in outputs if entropy is not None]) if with_entropy else None
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        chunk_backward = _compile(_chunk_backward) if ctx.compiled else _chunk_backward
        size = ctx.chunk_tokens
        grad_hidden = torch.empty_like(hidden)
        grad_weight: Tensor | None = None
        for start in range(0, max(len(hidden), 1), size):
            part = slice(start, start + size)
            chunk_grad_entropy = grad_entropy[part] if grad_entropy is not None else None
            grad_logits = chunk_backward(
                hidden[part], weight, labels[part], grad_log_probs[part], chunk_grad_entropy, ctx.temperature
            )
            grad_hidden[part] = grad_logits @ weight
            chunk_grad_weight = (grad_logits.T @ hidden[part]).float()
            grad_weight = chunk_grad_weight if grad_weight is None else grad_weight.add_(chunk_grad_weight)
        assert grad_weight is not None, "the loop runs at least once"
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _chunk_forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probs [C] and entropy [C] of one chunk."""
    all_log_probs = _all_log_probs(hidden, weight, temperature)
    log_probs = all_log_probs.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1) if with_entropy else None
    return log_probs, entropy


def _chunk_backward(
    hidden: Tensor, weight: Tensor, labels: Tensor, grad_log_probs: Tensor, grad_entropy: Tensor | None, temperature: float
) -> Tensor:
    """Return the gradient [C, V] of the unscaled logits, in the head's dtype.

    With p = softmax(z): d log p_y / dz_j = [j = y] - p_j and dH / dz_j = -p_j (log p_j + H).
    """
    all_log_probs = _all_log_probs(hidden, weight, temperature)
    probs = all_log_probs.exp()
    slope = grad_log_probs[:, None]
    if grad_entropy is not None:
        entropy = -(probs * all_log_probs).sum(-1, keepdim=True)
        slope = all_log_probs.add_(entropy).mul_(grad_entropy[:, None]).add_(slope)
    grad_logits = probs.mul_(slope).neg_()
    grad_logits.scatter_add_(-1, labels[:, None], grad_log_probs[:, None])
    return grad_logits.div_(temperature).to(weight.dtype)


def _all_log_probs(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Return the log-probs [C, V] float32 of the whole vocabulary."""
    logits = head_logits(hidden, weight).div_(temperature)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
