"""Log-probs and entropy of labels with a head that is split by vocabulary over the tensor-parallel ranks.

    rank r:   hidden [n, D] -> chunks [C, D] -> logits of its tokens [C, V/tp] float32 / temperature
    all:      maximum; then the sums of exp and of p log p, and the label's logit     three numbers a position cross ranks

Logits of at most `chunk_tokens` positions exist at a time, are never gathered, and are computed again in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwench.algorithms.log_probs import head_logits
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
        log_probs, log_sums, entropy = hidden.new_empty((3, len(hidden)), dtype=torch.float32)
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden, weight, shard, temperature, part, support)
            log_probs[part], log_sums[part], entropy[part] = _reduce_vocabulary(logits, labels[part], shard, with_entropy)
        ctx.save_for_backward(hidden, weight, labels, log_sums, entropy)
        ctx.shard, ctx.temperature, ctx.chunk_tokens, ctx.support = shard, temperature, chunk_tokens, support
        return log_probs.clone(), entropy.clone() if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sums, entropy = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        real = weight[: shard.num_real]
        grad_hidden = torch.zeros_like(hidden)
        trained = ctx.needs_input_grad[1]
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if trained else None
        for start in range(0, len(hidden), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            own_logits = _logits(hidden, weight, shard, ctx.temperature, part, ctx.support)
            own_log_probs = own_logits.sub_(log_sums[part, None])
            grad_logits = _grad_logits(
                own_log_probs,
                labels[part] - shard.first,
                entropy[part],
                grad_log_probs[part],
                None if grad_entropy is None else grad_entropy[part],
            )
            grad_logits = grad_logits.div_(ctx.temperature).to(weight.dtype)
            torch.mm(grad_logits, real, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight[: shard.num_real].add_(grad_logits.T @ hidden[part])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 6


def _logits(
    hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float, part: slice, support: Support | None
) -> Tensor:
    """Return [C, V'] float32, of this rank's real tokens; cut off where sampling has kept none."""
    logits = head_logits(hidden[part], weight[: shard.num_real]).div_(temperature)
    if support is not None:
        support.restrict(logits, part.start, first=shard.first)
    return logits


def _reduce_vocabulary(logits: Tensor, labels: Tensor, shard: VocabShard, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs of the labels, log of the sum of exponentials, and entropy (else 0), each [C] over the whole vocabulary.

    With z the logits less their maximum, S = sum exp z and E = sum z exp z: log p_y = z_y - log S and H = log S - E / S.
    """
    maximum = shard.all_reduce(logits.amax(-1), dist.ReduceOp.MAX)
    shifted = logits.sub_(maximum[:, None])
    own = labels - shard.first
    is_own = (own >= 0) & (own < shard.num_real)
    label_logits = shifted.gather(-1, own.where(is_own, 0)[:, None]).squeeze(-1).where(is_own, 0.0)
    exponentials = shifted.exp()
    sums = [label_logits, exponentials.sum(-1)]
    if with_entropy:
        sums.append(exponentials.mul_(shifted).sum(-1))
    label_logits, exp_sums, *weighted = shard.all_reduce(torch.stack(sums), dist.ReduceOp.SUM)
    log_sums = exp_sums.log()
    entropy = log_sums - weighted[0] / exp_sums if weighted else torch.zeros_like(log_sums)
    return label_logits - log_sums, log_sums + maximum, entropy


def _grad_logits(
    log_probs: Tensor, own_labels: Tensor, entropy: Tensor, grad_log_probs: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """Return the gradient [C, V'] of this rank's logits at the temperature.

    With p = softmax(z): d log p_y / dz_j = [j = y] - p_j and dH / dz_j = -p_j (log p_j + H).

    Args:
        log_probs: [C, V'] of all this rank's tokens; overwritten.
        own_labels: [C], counted from this rank's first token; outside of its range where another rank has the label.
    """
    num_tokens = log_probs.shape[-1]
    probs = log_probs.exp()
    slope = grad_log_probs[:, None]
    if grad_entropy is not None:
        slope = log_probs.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(slope)
    gradient = probs.mul_(slope).neg_()
    is_own = (own_labels >= 0) & (own_labels < num_tokens)
    at_label = grad_log_probs.where(is_own, 0.0)[:, None]
    return gradient.scatter_add_(-1, own_labels.where(is_own, 0)[:, None], at_label)
