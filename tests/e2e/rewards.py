"""Rewards of the end-to-end tests, named by import path. Two processes of every run import this file, so it loads little."""

from qwench.samples import Sample


def digit_share(sample: Sample) -> float:
    """Return which share of the response's characters are digits."""
    return sum(character in "0123456789" for character in sample.response) / max(1, len(sample.response))


def nothing(sample: Sample) -> float:
    """Give every response the same reward."""
    return 0.0


def always_half(sample: Sample) -> float:
    """Give every response half a point."""
    return 0.5


def not_a_number(sample: Sample) -> float:
    """Return no reward."""
    return float("nan")


def two_arguments(sample: Sample, label: str) -> float:
    """Have a signature that nobody calls."""
    return 0.0


def large_label(sample: Sample) -> float:
    """Return 1 where the prompt asks for a number above 4, also after a wrong answer: a critic can know it."""
    return float(int(sample.prompt.label or "0") > 4)
