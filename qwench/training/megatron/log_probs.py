"""Log-probs and entropy of labels with a head that is split by vocabulary over the tensor-parallel ranks.

    rank r:   hidden [n, D] -> chunks [C, D] -> logits of its tokens [C, V/tp] float32 -> scores among these tokens
    all:      the largest normalizer; then three sums     four numbers a position cross ranks

Logits of at most `chunk_tokens` positions exist at a time, are never gathered, and are computed again in the backward. The
kernels are those of the whole head (`algorithms.log_probs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwench.algorithms.log_probs import add_product, head_kernels, head_logits
from qwench.algorithms.support import Support


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabShard:
    """This rank's rows of the vocabulary, and the group that has the others."""

    group: dist.ProcessGroup
    first: int
    """Token of the first row."""
    num_real: int
    """Rows that are tokens; those after them pad the vocabulary."""

    @classmethod
    def of(cls, group: dist.ProcessGroup, *, num_rows: int, vocab_size: int) -> VocabShard:
        """Return the place of a rank that holds `num_rows` rows of a vocabulary."""
        first = group.rank() * num_rows
        num_real = min(num_rows, vocab_size - first)
        assert num_real > 0, f"{group.size()} ranks are too many for a vocabulary of {vocab_size}"
        return cls(group=group, first=first, num_real=num_real)

    def own(self, labels: Tensor) -> Tensor:
        """Return the row of each label, -1 where another rank has it."""
        rows = labels - self.first
        return rows.where((rows >= 0) & (rows < self.num_real), -1)

    def all_reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        """Reduce over the ranks, in place."""
        if self.group.size() > 1:
            dist.all_reduce(values, op=operation, group=self.group)
        return values


def parallel_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = False,
    support: Support | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs of `labels`, and on request the entropy of the whole distribution, at `temperature`.

    Every rank of the group calls it with the same `hidden` and `labels`, and gets the same results.

    Args:
        hidden: [n, D].
        head_weight: [V/tp, D], dtype of `hidden`.
        labels: [n] int64.
        support: See `token_log_probs`.

    Returns:
        log-probs [n] float32; entropy [n] float32 or None. The gradient to `hidden` is this rank's share, of which the group's
        sum is the whole; that to `head_weight` is whole.
    """
    outputs: tuple[Tensor, Tensor | None] = _ShardedHead.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        hidden, head_weight, labels, shard, temperature, chunk_tokens, with_entropy, support
    )
    return outputs


class _ShardedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch's context object takes any attribute
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: VocabShard,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
        support: Support | None,
    ) -> tuple[Tensor, Tensor | None]:
        kernels = head_kernels(hidden)
        log_probs, log_sums, entropy = hidden.new_empty((3, len(hidden)), dtype=torch.float32)
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden, weight, shard, part, support)
            own = shard.own(labels[part])
            own_log_probs, entropies, normalizers = kernels.statistics(logits, own.clamp(min=0), temperature)
            scores = _joined(own_log_probs, entropies, normalizers, own >= 0, shard)
            log_probs[part], entropy[part], log_sums[part] = scores
        ctx.save_for_backward(hidden, weight, labels, log_sums, entropy)
        ctx.shard, ctx.temperature, ctx.chunk_tokens, ctx.support = shard, temperature, chunk_tokens, support
        return log_probs.clone(), entropy.clone() if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sums, entropy = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        kernels, real = head_kernels(hidden), weight[: shard.num_real]
        grad_hidden = torch.zeros_like(hidden)
        trained = ctx.needs_input_grad[1]
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if trained else None
        for start in range(0, len(hidden), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            grad_logits = kernels.gradient(
                _logits(hidden, weight, shard, part, ctx.support),
                shard.own(labels[part]),
                entropy[part],
                log_sums[part],
                grad_log_probs[part],
                None if grad_entropy is None else grad_entropy[part],
                temperature=ctx.temperature,
                dtype=weight.dtype,
            )
            torch.mm(grad_logits, real, out=grad_hidden[part])
            if grad_weight is not None:
                add_product(grad_weight[: shard.num_real], grad_logits, hidden[part])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 6


def _logits(hidden: Tensor, weight: Tensor, shard: VocabShard, part: slice, support: Support | None) -> Tensor:
    """Return [C, V'] float32, of this rank's real tokens; cut off where sampling has kept none."""
    logits = head_logits(hidden[part], weight[: shard.num_real])
    if support is not None:
        support.restrict(logits, part.start, first=shard.first)
    return logits


def _joined(
    log_probs: Tensor, entropies: Tensor, normalizers: Tensor, is_own: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropies and normalizers [C] over the whole vocabulary, from those among each rank's tokens.

    With L_r the normalizer and H_r the entropy of rank r, and w_r = exp(L_r - max L), a rank's share of the probability is
    w_r / sum w. Then L = max L + log sum w and H = L + sum w_r (H_r - L_r) / sum w.
    """
    if shard.group.size() == 1:
        return log_probs, entropies, normalizers
    largest = shard.all_reduce(normalizers.clone(), dist.ReduceOp.MAX)
    share = (normalizers - largest).exp()
    label_logits = (log_probs + normalizers).where(is_own, 0.0)
    sums = torch.stack((label_logits, share, share * (entropies - normalizers)))
    label_logits, share, weighted = shard.all_reduce(sums, dist.ReduceOp.SUM)
    whole = largest + share.log()
    return label_logits - whole, whole + weighted / share, whole
