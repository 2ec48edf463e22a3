"""Log-probs and entropy of labels from hidden states, without ever holding all logits.

Logits of at most `chunk_tokens` positions are computed at a time. The backward needs them once more: chunks that fit into
`kept_bytes` keep theirs, the others compute them again. The gradient of the head is summed over chunks in float32:

    hidden [T, D] -> chunks [C, D] -> logits [C, V] float32 / temperature -> log-probs [C], entropy [C]
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwench.algorithms import head_elementwise
from qwench.algorithms.support import Support
from qwench.models.decoder.products import linear


def token_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = False,
    weight_sum: Tensor | None = None,
    kept_bytes: int = 0,
    support: Support | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs of `labels`, and on request the entropy of the whole distribution, at `temperature`.

    Args:
        hidden: [T, D], any floating dtype.
        head_weight: [V, D], dtype of `hidden`; see `head_logits` for the product, everything after is float32.
        labels: [T] int64.
        weight_sum: [V, D] float32, to which the backward adds the gradient of the head; None: autograd gets it.
        kept_bytes: Logits that may wait for the backward.
        support: The tokens that sampling kept, over which log-probs and entropy are normalised. None: all.

    Returns:
        log-probs [T] float32; entropy [T] float32 or None. Both carry gradients to `hidden` and `head_weight`.
    """
    outputs: tuple[Tensor, Tensor | None] = _ChunkedHead.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        hidden, head_weight, labels, temperature, chunk_tokens, with_entropy, weight_sum, kept_bytes, support
    )
    return outputs


def head_logits(hidden: Tensor, head_weight: Tensor, *, product: Callable[..., Tensor] = linear) -> Tensor:
    """Return the logits [T, V] float32 of `hidden` [T, D] and `head_weight` [V, D], without a gradient.

    With CUDA the product of bfloat16 factors is stored as it was accumulated: rounding logits to bfloat16 alone moves log-probs
    by about 0.02 on models whose logits are large. CPU and ROCm have no such product and round.
    """
    if _accumulates(hidden):
        return torch.mm(hidden, head_weight.T, out_dtype=torch.float32)
    return product(hidden, head_weight, None).float()


def add_product(total: Tensor, grad_TN: Tensor, x_TK: Tensor) -> None:
    """Add the gradient [N, K] of a matrix to its float32 sum, in the product itself where the device can."""
    if total.dtype == x_TK.dtype:
        total.addmm_(grad_TN.T, x_TK)
    elif _accumulates(x_TK):
        torch.addmm(total, grad_TN.T, x_TK, out_dtype=total.dtype, out=total)
    else:
        total += grad_TN.T @ x_TK


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch's context object takes any attribute
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
        weight_sum: Tensor | None,
        kept_bytes: int,
        support: Support | None,
    ) -> tuple[Tensor, Tensor | None]:
        kernels = head_kernels(hidden)
        kept: list[Tensor | None] = []
        room = kept_bytes if ctx.needs_input_grad[0] else 0
        columns = []
        for index, chunk_labels in enumerate(labels.split(chunk_tokens)):
            logits = _restricted_logits(hidden, weight, support, index, chunk_tokens)
            columns.append(kernels.statistics(logits, chunk_labels, temperature))
            room -= logits.nbytes
            kept.append(logits if room >= 0 else None)
            del logits  # two chunks would exist at a time
        log_probs, entropy, normalizers = (torch.cat([chunk[i] for chunk in columns]) for i in range(3))
        ctx.save_for_backward(hidden, weight, labels, entropy, normalizers)
        ctx.temperature, ctx.chunk_tokens, ctx.weight_sum, ctx.kept = temperature, chunk_tokens, weight_sum, kept
        ctx.support = support
        ctx.set_materialize_grads(False)
        return log_probs, entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, entropy, normalizers = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(normalizers)
        kernels, size = head_kernels(hidden), ctx.chunk_tokens
        grad_hidden = torch.empty_like(hidden)
        total = ctx.weight_sum
        if total is None and ctx.needs_input_grad[1]:
            total = torch.zeros_like(weight, dtype=torch.float32)
        for index, logits in enumerate(ctx.kept):
            part = slice(index * size, (index + 1) * size)
            if logits is None:
                logits = _restricted_logits(hidden, weight, ctx.support, index, size)
            ctx.kept[index] = None
            grad_logits = kernels.gradient(
                logits,
                labels[part],
                entropy[part],
                normalizers[part],
                grad_log_probs[part],
                None if grad_entropy is None else grad_entropy[part],
                temperature=ctx.temperature,
                dtype=weight.dtype,
            )
            del logits  # its memory holds the gradient now
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            if total is not None:
                add_product(total, grad_logits, hidden[part])
        returned = None if total is None or ctx.weight_sum is not None else total.to(weight.dtype)
        return grad_hidden, returned, *[None] * 7


def _restricted_logits(hidden: Tensor, weight: Tensor, support: Support | None, index: int, size: int) -> Tensor:
    """Return the logits of a chunk, cut off where sampling has kept no token."""
    logits = head_logits(hidden[index * size : (index + 1) * size], weight)
    if support is not None:
        support.restrict(logits, index * size)
    return logits


def _accumulates(factor: Tensor) -> bool:
    """Tell whether a product of such factors can be stored in float32, as it was accumulated."""
    return factor.is_cuda and torch.version.cuda is not None and factor.dtype != torch.float32


def head_kernels(hidden: Tensor) -> ModuleType:
    """Return the head's arithmetic for the device of the hidden states."""
    if not hidden.is_cuda:
        return head_elementwise
    import qwench.algorithms.head_triton as kernels  # noqa: PLC0415 - Triton is installed only with GPU builds of PyTorch

    return kernels
