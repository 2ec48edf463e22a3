"""Log-probs and entropy of labels from hidden states, without ever holding all logits.

Logits of at most `chunk_tokens` positions are computed at a time. The backward needs them once more: chunks that fit into
`kept_bytes` keep theirs, the others compute them again. On Hopper GPUs they only exist as tiles, and a chunk keeps what the
gradient can be made of. The gradient of the head is summed over chunks in float32:

    hidden [T, D] -> chunks [C, D] -> logits [C, V] float32 / temperature -> log-probs [C], entropy [C]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

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


def logit_bytes(device: torch.device, dtype: torch.dtype, hidden_size: int) -> int:
    """Return the bytes of a logit over all tokens, while its chunk waits for the backward or is in it."""
    return (_TiledHead if _can_be_tiled(device, dtype, hidden_size) else _LogitsHead).logit_bytes


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
        head = _head_of(hidden, weight, labels, temperature, support)
        kept: list[Kept | None] = []
        room = kept_bytes if ctx.needs_input_grad[0] else 0
        columns = []
        for start in range(0, max(len(labels), 1), chunk_tokens):
            part = slice(start, min(start + chunk_tokens, len(labels)))
            room -= head.logit_bytes * len(weight) * (part.stop - part.start)
            scores, for_backward = head.score(part, keep=room >= 0)
            columns.append(scores)
            kept.append(for_backward)
        log_probs, entropy, normalizers = (torch.cat([chunk[i] for chunk in columns]) for i in range(3))
        ctx.save_for_backward(hidden, weight, labels, log_probs, entropy, normalizers)
        ctx.temperature, ctx.chunk_tokens, ctx.weight_sum, ctx.kept = temperature, chunk_tokens, weight_sum, kept
        ctx.head, ctx.support = type(head), support
        ctx.set_materialize_grads(False)
        return log_probs, entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, *columns = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(columns[0])
        head, size = ctx.head(hidden, weight, labels, ctx.temperature, ctx.support), ctx.chunk_tokens
        grad_hidden = torch.empty_like(hidden)
        total = ctx.weight_sum
        if total is None and ctx.needs_input_grad[1]:
            total = torch.zeros_like(weight, dtype=torch.float32)
        for index in range(len(ctx.kept)):
            part = slice(index * size, (index + 1) * size)
            kept, ctx.kept[index] = ctx.kept[index], None
            scores = columns[0][part], columns[1][part], columns[2][part]
            grads = grad_log_probs[part], None if grad_entropy is None else grad_entropy[part]
            grad_logits, factors = head.gradient(part, scores, grads, kept)
            del kept  # the gradient lies in its memory
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            factor = hidden[part]
            if factors is not None:
                grad_hidden[part].mul_(factors[:, None])
                factor = (factor * factors[:, None]).to(hidden.dtype)
            if total is not None:
                add_product(total, grad_logits, factor)
            del grad_logits  # two chunks would exist at a time
        returned = None if total is None or ctx.weight_sum is not None else total.to(weight.dtype)
        return grad_hidden, returned, *[None] * 7


Columns = tuple[Tensor, Tensor, Tensor]
"""Log-probs, entropies and normalizers of a chunk."""
Gradients = tuple[Tensor, Tensor | None]
"""Of log-probs and entropies."""
Kept = tuple[Tensor, ...]
"""What a chunk leaves for its backward."""


@dataclass(frozen=True, slots=True)
class _LogitsHead:
    """Chunks whose logits are made in float32."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    temperature: float
    support: Support | None

    logit_bytes: ClassVar = 4
    """Of each logit of a chunk that is kept, or whose gradient is made."""

    def score(self, part: slice, *, keep: bool) -> tuple[Columns, Kept | None]:
        """Return scores of a chunk, and on request what `gradient` wants."""
        logits = self._logits(part)
        columns = head_kernels(logits).statistics(logits, self.labels[part], self.temperature)
        return columns, (logits,) if keep else None

    def gradient(self, part: slice, columns: Columns, grads: Gradients, kept: Kept | None) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the logits: a matrix [C, V], in memory of `kept`, and on occasion factors [C] of its rows."""
        logits = self._logits(part) if kept is None else kept[0]
        _, entropies, normalizers = columns
        matrix = head_kernels(logits).gradient(
            logits,
            self.labels[part],
            entropies,
            normalizers,
            *grads,
            temperature=self.temperature,
            dtype=self.weight.dtype,
        )
        return matrix, None

    def _logits(self, part: slice) -> Tensor:
        """Return the logits of a chunk, cut off where sampling has kept no token."""
        logits = head_logits(self.hidden[part], self.weight)
        if self.support is not None:
            self.support.restrict(logits, part.start)
        return logits


class _TiledHead(_LogitsHead):
    """Chunks whose logits exist only as tiles in registers: see `head_product_triton`."""

    logit_bytes: ClassVar = 2

    def score(self, part: slice, *, keep: bool) -> tuple[Columns, Kept | None]:
        found: tuple[Columns, Kept | None] = _tiled().scores(
            self.hidden[part], self.weight, self.labels[part], self.temperature, keep=keep
        )
        return found

    def gradient(self, part: slice, columns: Columns, grads: Gradients, kept: Kept | None) -> tuple[Tensor, Tensor | None]:
        if kept is not None:
            found: tuple[Tensor, Tensor | None] = _tiled().kept_gradient(
                kept, self.labels[part], columns, grads, self.temperature
            )
            return found
        return _tiled().gradient(self.hidden[part], self.weight, self.labels[part], columns, grads, self.temperature), None


def _head_of(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, support: Support | None) -> _LogitsHead:
    """Return the fastest way to score these positions."""
    can_be_tiled = support is None and _can_be_tiled(hidden.device, weight.dtype, hidden.shape[1])
    kind = _TiledHead if can_be_tiled and _tiled().are_aligned(hidden, weight) else _LogitsHead
    return kind(hidden, weight, labels, temperature, support)


def _can_be_tiled(device: torch.device, dtype: torch.dtype, hidden_size: int) -> bool:
    """Tell whether `head_product_triton` multiplies such factors, where they are aligned."""
    is_hopper = device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and dtype == torch.bfloat16 and hidden_size % 64 == 0


def _tiled() -> ModuleType:
    import qwench.algorithms.head_product_triton as kernels  # noqa: PLC0415 - Triton is installed only with GPU builds of PyTorch

    return kernels


def _accumulates(factor: Tensor) -> bool:
    """Tell whether a product of such factors can be stored in float32, as it was accumulated."""
    return factor.is_cuda and torch.version.cuda is not None and factor.dtype != torch.float32


def head_kernels(hidden: Tensor) -> ModuleType:
    """Return the head's arithmetic for the device of the hidden states."""
    if not hidden.is_cuda:
        return head_elementwise
    import qwench.algorithms.head_triton as kernels  # noqa: PLC0415 - Triton is installed only with GPU builds of PyTorch

    return kernels
