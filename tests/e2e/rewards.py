"""Rewards of the end-to-end tests, named by import path."""

from qwench.samples import Sample


def digit_share(sample: Sample) -> float:
    """Return which share of the response's characters are digits."""
    return sum(character in "0123456789" for character in sample.response) / max(1, len(sample.response))


def not_a_number(sample: Sample) -> float:
    """Return no reward."""
    return float("nan")


def two_arguments(sample: Sample, label: str) -> float:
    """Have a signature that nobody calls."""
    return 0.0
