"""Checksums of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.engines import checksum
from qwench.engines.checksum import WEIGHT_PERIOD, tensor_checksum


def plain_checksum(values: list[int], element_size: int, chunk: int) -> int:
    """The same sum in Python's unbounded integers, reduced at the end."""
    total = len(values) * 16 + element_size
    for start in range(0, len(values), chunk):
        part = values[start : start + chunk]
        total = total * 6_364_136_223_846_793_005
        total += sum(value * (i % WEIGHT_PERIOD + 1) for i, value in enumerate(part))
        total += sum(value * (i // WEIGHT_PERIOD + 1) for i, value in enumerate(part)) << 32
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50), st.integers(1, 60))
def test_checksum_equals_the_sum_in_unbounded_integers(values, chunk):
    before = checksum.CHUNK_ELEMENTS
    checksum.CHUNK_ELEMENTS = chunk
    try:
        assert tensor_checksum(torch.tensor(values, dtype=torch.int32)) == plain_checksum(values, 4, chunk)
    finally:
        checksum.CHUNK_ELEMENTS = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_one_changed_bit_or_a_swap_changes_it(dtype):
    tensor = torch.arange(1, 200).to(dtype)
    seen = {tensor_checksum(tensor)}
    for index in (0, 77, 198):
        changed = tensor.clone()
        changed[index] = 0
        seen.add(tensor_checksum(changed))
    swapped = tensor.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    seen |= {tensor_checksum(swapped), tensor_checksum(tensor[:-1]), tensor_checksum(tensor.flip(0))}
    assert len(seen) == 7


def test_swap_at_the_distance_of_the_period_changes_it():
    tensor = torch.zeros(WEIGHT_PERIOD * 2, dtype=torch.float32)
    tensor[5] = 1.0
    other = tensor.roll(WEIGHT_PERIOD)
    assert tensor_checksum(tensor) != tensor_checksum(other)


def test_layout_in_memory_does_not_matter_but_order_does():
    tensor = torch.randn(6, 4)
    assert tensor_checksum(tensor.t()) == tensor_checksum(tensor.t().contiguous()) != tensor_checksum(tensor)
