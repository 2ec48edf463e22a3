"""Random numbers against SplitMix64 in whole numbers."""

from __future__ import annotations

import numpy as np

from qwench.engines.embedded.scheduling.uniform import uniform


def splitmix64(state: int) -> int:
    """Return the first output of a generator with this state, as java.util.SplittableRandom computes it."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_numbers_are_those_of_splitmix64_at_a_position():
    assert splitmix64(0) == 0xE220A8397B1DCDAF, "its published first output"
    pairs = [(0, 0), (0, 1), (1, 0), (2**64 - 1, 2**40), (12345, 99)]
    found = uniform(*(np.array(column, dtype=np.uint64) for column in zip(*pairs, strict=True)))
    # Outputs of one generator are those of states that lie a constant apart.
    expected = [splitmix64((splitmix64(seed) + position * 0x9E3779B97F4A7C15) % 2**64) >> 11 for seed, position in pairs]
    assert [int(number * 2**53) for number in found.tolist()] == expected
