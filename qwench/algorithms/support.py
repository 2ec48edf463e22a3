"""Replay of truncated sampling: the trainer normalises over the tokens that the engine drew from.

    kept tokens    [4 7] [2] [1 3 9]      counts [2 1 3], ids [4 7 2 1 3 9]      int32, back to back
    log p(y) = z_y - log sum over kept k of exp z_k

The kept tokens of a position stay those of the engine while the policy changes. Without them its log-probs would be those of
another distribution than the one that was sampled.

Source: slime's `rollout_top_p_token_ids`; "keep sampling mask" in DeepSeek-V3.2 (arXiv 2512.02556), section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.algorithms.columns import MicroBatch, on_device

CUT_OFF = -1e30
"""Logit of a token that was not kept. Finite: its probability is 0, and 0 times it is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """The kept tokens of n scored positions, on the host."""

    ends: Tensor
    """[n] int64: where the ids of each position end."""
    ids: Tensor
    """[N] int64."""

    @classmethod
    def of(cls, micro_batch: MicroBatch, positions: Tensor) -> Support | None:
        """Return the kept tokens of these positions [n] of the micro-batch; None: nothing was cut off."""
        counts, ids = micro_batch.support_counts, micro_batch.support_ids
        if counts is None or ids is None:
            return None
        counts = counts.long()
        starts, wanted = (counts.cumsum(0) - counts)[positions], counts[positions]
        ends = wanted.cumsum(0)
        offsets = torch.arange(int(wanted.sum())) - torch.repeat_interleave(ends - wanted, wanted)
        return cls(ends=ends, ids=ids[torch.repeat_interleave(starts, wanted) + offsets].long())

    def restrict(self, logits: Tensor, start: int, *, first: int = 0) -> None:
        """Set the logits [C, V'] of the positions from `start` on to `CUT_OFF` where the token was not kept.

        Args:
            first: token of the first column, where ranks split the vocabulary.
        """
        ends = self.ends[start : start + len(logits)]
        begin = int(self.ends[start - 1]) if start > 0 else 0
        counts = ends.diff(prepend=ends.new_tensor([begin]))
        ids = self.ids[begin : begin + int(counts.sum())] - first
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        own = (ids >= 0) & (ids < logits.shape[-1])
        rows, ids = on_device(rows[own], logits.device), on_device(ids[own], logits.device)
        kept = logits[rows, ids]
        logits.fill_(CUT_OFF)
        logits[rows, ids] = kept
