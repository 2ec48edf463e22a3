"""The head's arithmetic on logits in plain PyTorch: the reference, and the code for CPUs.

`head_triton` has the same functions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs of the labels, entropies and logs of the normalizers, [C] float32, of softmax(logits / temperature).

    Args:
        logits: [C, V] float32.
        labels: [C] int64.
    """
    scaled = logits / temperature
    normalizers = scaled.logsumexp(-1, keepdim=True)
    all_log_probs = scaled.sub_(normalizers)
    log_probs = all_log_probs.gather(-1, labels[:, None]).squeeze(-1)
    return log_probs, -(all_log_probs.exp() * all_log_probs).sum(-1), normalizers.squeeze(-1)


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
    """Return the gradient [C, V] of the logits in `dtype`, which takes the memory of the logits where it can.

    With z = logits / temperature and p = softmax(z): d log p_y / dz_j = [j = y] - p_j and dH / dz_j = -p_j (log p_j + H).
    A label below 0 is none of the columns.
    """
    all_log_probs = logits.div_(temperature).sub_(normalizers[:, None])
    probs = all_log_probs.exp()
    slope = grad_log_probs[:, None]
    if grad_entropies is not None:
        slope = all_log_probs.add_(entropies[:, None]).mul_(grad_entropies[:, None]).add_(slope)
    grad_logits = probs.mul_(slope).neg_()
    at_labels = grad_log_probs.where(labels >= 0, 0.0)
    grad_logits.scatter_add_(-1, labels.clamp(min=0)[:, None], at_labels[:, None])
    return grad_logits.div_(temperature).to(dtype)
