"""Supervised fine-tuning: the negative log-likelihood of the trained tokens.

    loss_t = -log p_t

    p (0.5, 0.25)    loss (0.693147, 1.386294)

The loss of a step is a mean over each sample's tokens, then over samples. Flag `--calculate-per-token-loss` takes one mean over
all tokens.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.columns import MicroBatch, TokenLoss
from qwench.algorithms.losses import negative_log_likelihood
from qwench.algorithms.method import Method, Needs, weighted_sums


class Sft(Method, name="sft"):
    """See the module docstring."""

    def needs(self, *, num_steps: int) -> Needs:
        """Need no scores; the entropy only where a flag asks for it."""
        return Needs(entropy=self.section.observe_training_entropy)

    def loss(self, log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
        """Return the micro-batch's share of the loss."""
        loss = negative_log_likelihood(log_probs.where(micro_batch.loss_mask, 0.0))
        return weighted_sums(loss, {} if entropy is None else {"entropy_loss": entropy}, micro_batch, peaks={})
