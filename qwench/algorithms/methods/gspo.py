"""GSPO: GRPO's advantages, clipped ratios of whole sequences.

    ratio = exp(mean over the sequence of log(p_t / p_old_t)),    loss_t as in grpo

    log(p / p_old)   mean   ratio              A   eps        loss of both tokens
    (0.6, -0.2)      0.2    exp(0.2) = 1.221   1   0.2, 0.2   -1.2
    (0.2, -0.2)      0      1                  1   0.2, 0.2   -1

Source: arXiv 2507.18071.
"""

from __future__ import annotations

from torch import Tensor

from qwench.algorithms.losses import sequence_log_ratio
from qwench.algorithms.methods.policy_gradient import PolicyGradient, Tokens


class Gspo(PolicyGradient, name="gspo"):
    """See the module docstring."""

    always_scores_old = True

    def log_ratio(self, tokens: Tokens) -> Tensor:
        """Return the mean log-ratio of each token's sequence."""
        return sequence_log_ratio(tokens.log_probs, tokens.old_log_probs, tokens.mask, tokens.sequence_ids)
