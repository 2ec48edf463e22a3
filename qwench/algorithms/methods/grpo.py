"""GRPO: rewards standardised within their group, one advantage a sample, clipped ratios of tokens.

Source: arXiv 2402.03300; `--disable-grpo-std-normalization`: Dr. GRPO (arXiv 2503.20783).
"""

from __future__ import annotations

from qwench.algorithms.methods.policy_gradient import PolicyGradient


class Grpo(PolicyGradient, name="grpo"):
    """The policy gradient as it is."""
