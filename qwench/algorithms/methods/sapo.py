"""SAPO: GRPO's advantages, and a smooth gate on the ratio of a token instead of a clip.

    loss_t = -4 / tau * sigmoid(tau * (ratio_t - 1)) * A_t,    tau = --sapo-tau-pos where A_t > 0, else --sapo-tau-neg

The gradient at ratio r is 4 s (1 - s) r A, s = sigmoid(tau (r - 1)): the plain policy gradient at r = 1, and less far from it.

    tau   ratio   A      loss
    1     1       1      -2            4/1 * 1/2
    1     2       1      -2.924234     4 * 0.731059
    2     1.5     -1     1.462117      4/2 * 0.731059

Source: arXiv 2511.20347.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.algorithms.methods.policy_gradient import PolicyGradient, Tokens


class Sapo(PolicyGradient, name="sapo"):
    """See the module docstring."""

    def surrogate(self, log_ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the loss [T]; nothing is clipped."""
        advantages, section = tokens.advantages, self.section
        tau = torch.where(advantages > 0, section.sapo_tau_pos, section.sapo_tau_neg)
        gate = (tau * (log_ratio.exp() - 1)).sigmoid() * 4 / tau
        return -gate * advantages, torch.zeros_like(tokens.mask)
