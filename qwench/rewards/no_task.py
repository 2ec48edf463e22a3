"""The reward of distillation without a task (`config.sections.reward.NO_TASK`)."""

from __future__ import annotations

from qwench.samples import Sample


def score(sample: Sample) -> float:
    """Return 0 for every response."""
    return 0.0
