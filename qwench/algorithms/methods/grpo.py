"""GRPO: rewards standardised within their group, one advantage a sample, clipped ratios of tokens.

    A_i = (reward_i - mean(group)) / (std(group) + 1e-6)
    loss_t = max(-ratio_t A, -clip(ratio_t, 1 - eps_low, 1 + eps_high) A),    ratio_t = p_t / p_old_t

    rewards (1, 0, 0, 0)    mean 1/4, std 1/2    A (1.5, -0.5, -0.5, -0.5)

    ratio   A     eps        loss
    1.5     1     0.2, 0.2   -1.2
    0.5     1     0.2, 0.2   -0.5
    0.5     -1    0.2, 0.2   0.8

Source: arXiv 2402.03300; `--disable-grpo-std-normalization`: Dr. GRPO (arXiv 2503.20783).
"""

from __future__ import annotations

from qwench.algorithms.methods.policy_gradient import PolicyGradient


class Grpo(PolicyGradient, name="grpo"):
    """The policy gradient as it is."""
