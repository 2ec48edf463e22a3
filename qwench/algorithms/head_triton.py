# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""The head's arithmetic on logits, one Triton kernel for each function of `head_elementwise`.

One program reads one row from its begin to its end. Both kernels are bound by memory: 4 and 6 bytes a logit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def statistics(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `head_elementwise.statistics`."""
    num_rows, size = logits.shape
    log_probs, entropies, normalizers = torch.empty((3, num_rows), dtype=torch.float32, device=logits.device)
    if num_rows:
        _statistics[(num_rows,)](
            logits,
            labels,
            log_probs,
            entropies,
            normalizers,
            logits.stride(0),
            1.0 / temperature,
            SIZE=size,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return log_probs, entropies, normalizers


def gradient(
    logits: Tensor,
    labels: Tensor,
    entropies: Tensor,
    normalizers: Tensor,
    grad_log_probs: Tensor,
    grad_entropies: Tensor | None,
    *,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """See `head_elementwise.gradient`. The result lies in the memory of the logits, each row where its logits began."""
    num_rows, size = logits.shape
    output = logits.view(dtype)[:, :size]
    if num_rows:
        _gradient[(num_rows,)](
            logits,
            output,
            labels,
            entropies,
            normalizers,
            grad_log_probs.contiguous(),
            grad_log_probs if grad_entropies is None else grad_entropies.contiguous(),
            logits.stride(0),
            output.stride(0),
            1.0 / temperature,
            HAS_ENTROPY=grad_entropies is not None,
            SIZE=size,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return output


@triton.jit
def _statistics(
    logits_pointer,
    label_pointer,
    log_prob_pointer,
    entropy_pointer,
    normalizer_pointer,
    stride,
    inverse_temperature,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With m the largest z so far: s = sum exp(z - m), w = sum (z - m) exp(z - m); then lse = m + log s, H = log s - w / s."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits = logits_pointer + row * stride
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        z = tl.load(logits + start + column, mask=start + column < SIZE, other=float("-inf")) * inverse_temperature
        new_largest = tl.maximum(largest, tl.max(z, 0))
        shrink = tl.exp(largest - new_largest)
        shift = tl.where(largest > float("-inf"), (largest - new_largest) * shrink, 0.0)
        difference = z - new_largest
        exponential = tl.exp(difference)
        weighted = weighted * shrink + total * shift + tl.where(difference > float("-inf"), difference * exponential, 0.0)
        total = total * shrink + exponential
        largest = new_largest
    log_total = tl.log(tl.sum(total, 0))
    labelled = tl.load(logits + tl.load(label_pointer + row)) * inverse_temperature
    tl.store(log_prob_pointer + row, labelled - (largest + log_total))
    tl.store(entropy_pointer + row, log_total - tl.sum(weighted, 0) / tl.sum(total, 0))
    tl.store(normalizer_pointer + row, largest + log_total)


@triton.jit
def _gradient(
    logits_pointer,
    output_pointer,
    label_pointer,
    entropy_pointer,
    normalizer_pointer,
    grad_log_prob_pointer,
    grad_entropy_pointer,
    stride,
    output_stride,
    inverse_temperature,
    HAS_ENTROPY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    label, normalizer = tl.load(label_pointer + row), tl.load(normalizer_pointer + row)
    grad_log_prob = tl.load(grad_log_prob_pointer + row)
    if HAS_ENTROPY:
        entropy, grad_entropy = tl.load(entropy_pointer + row), tl.load(grad_entropy_pointer + row)
    for start in range(0, SIZE, BLOCK):
        inside = start + column < SIZE
        z = tl.load(logits_pointer + row * stride + start + column, mask=inside, other=float("-inf")) * inverse_temperature
        log_prob = z - normalizer
        slope = grad_log_prob
        if HAS_ENTROPY:
            slope = grad_log_prob + grad_entropy * tl.where(inside, log_prob + entropy, 0.0)
        result = tl.where(start + column == label, grad_log_prob, 0.0) - tl.exp(log_prob) * slope
        # The result begins where the logits do and is not wider: it overwrites what all threads have read by now.
        tl.debug_barrier()
        result = (result * inverse_temperature).to(output_pointer.dtype.element_ty)
        tl.store(output_pointer + row * output_stride + start + column, result, mask=inside)
