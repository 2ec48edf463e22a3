"""What the flags make of graded samples before a method compares their rewards: the price of length, and truncated samples.

    longest response 100, --overlong-buffer-len 20, factor 1        length  80    90     100
                                                                    reward  + 0   - 0.5  - 1

Filters, pass rates and `raw_reward` see the rewards without the price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.config.config import Config
from qwench.samples import Sample, Status


@dataclass(frozen=True, kw_only=True, slots=True)
class Shaping:
    """See the module docstring; with None and False it changes nothing."""

    max_response_len: int | None = None
    buffer_len: int | None = None
    penalty_factor: float = 1.0
    masks_truncated: bool = False

    @classmethod
    def of(cls, config: Config) -> Shaping:
        """Read the flags."""
        return cls(
            max_response_len=config.rollout.rollout_max_response_len,
            buffer_len=config.reward.overlong_buffer_len,
            penalty_factor=config.reward.overlong_penalty_factor,
            masks_truncated=config.reward.mask_truncated_completions,
        )

    def apply(self, batch: RolloutBatch, samples: Sequence[Sample]) -> RolloutBatch:
        """Return the batch with lower rewards of long responses, and without trained tokens in truncated ones."""
        if self.buffer_len is not None:
            assert self.max_response_len is not None, "config.rules requires --rollout-max-response-len"
            lengths = _execution_lengths(samples)
            penalties = overlong_penalty(
                lengths, max_len=self.max_response_len, buffer_len=self.buffer_len, factor=self.penalty_factor
            )
            batch = batch.with_columns(rewards=batch.rewards + penalties, overlong_penalties=penalties)
        if self.masks_truncated:
            masks = zip(batch.loss_mask, samples, strict=True)
            batch = batch.with_columns(loss_mask=[mask & (one.status is not Status.TRUNCATED) for mask, one in masks])
        return batch


def overlong_penalty(lengths: Tensor, *, max_len: int, buffer_len: int, factor: float) -> Tensor:
    """Return [B] float32: 0 up to max_len - buffer_len tokens, from there linear down to -factor at max_len, and beyond.

    Source: DAPO (arXiv 2503.14476) eq. 13.
    """
    exceeding = lengths.double() - (max_len - buffer_len)
    return (-exceeding / buffer_len).clamp(-1.0, 0.0).mul(factor).float()


def _execution_lengths(samples: Sequence[Sample]) -> Tensor:
    """Return [B] response tokens, of an execution with several samples those of its longest: they share their reward."""
    longest = dict[int | None, int]()
    for sample in samples:
        longest[sample.execution_id] = max(longest.get(sample.execution_id, 0), sample.response_length)
    return torch.tensor([longest[sample.execution_id] for sample in samples])
