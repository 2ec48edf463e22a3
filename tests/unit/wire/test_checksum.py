"""Checksums of tensors."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.wire import checksum
from qwench.wire.checksum import PendingChecksums, tensor_checksums
from tests.checksums import tensor_checksum


def signed(value: int, bits: int) -> int:
    value %= 2**bits
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def plain_checksum(content: bytes, num_elements: int, element_size: int) -> int:
    """The same sum in Python's unbounded integers, reduced at the end."""
    words = struct.unpack(f"<{-(-len(content) // 4)}i", content.ljust(-(-len(content) // 4) * 4, b"\0"))
    total = sum(word * signed((i + 1) * 0x9E3779B1, 32) for i, word in enumerate(words))
    return signed(total * 6_364_136_223_846_793_005 + num_elements * 16 + element_size, 64)


@settings(max_examples=60)
@given(st.binary(max_size=200), st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]), st.integers(1, 60))
def test_checksum_equals_the_sum_in_unbounded_integers(content, dtype, words_at_once):
    content = content[: len(content) // dtype.itemsize * dtype.itemsize]
    tensor = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
    before = checksum._WORDS_AT_ONCE
    checksum._WORDS_AT_ONCE = words_at_once
    try:
        assert tensor_checksum(tensor) == plain_checksum(content, tensor.numel(), dtype.itemsize)
    finally:
        checksum._WORDS_AT_ONCE = before


@settings(max_examples=60)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=50), st.data())
def test_any_swap_and_any_changed_word_change_it(values, data):
    first, second = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=2, max_size=2, unique=True))
    other = data.draw(st.integers(-(2**31), 2**31 - 1))
    swapped, changed = list(values), list(values)
    swapped[first], swapped[second] = values[second], values[first]
    changed[first] = other
    own = tensor_checksum(torch.tensor(values, dtype=torch.int32))
    assert (tensor_checksum(torch.tensor(swapped, dtype=torch.int32)) == own) is (swapped == values)
    assert (tensor_checksum(torch.tensor(changed, dtype=torch.int32)) == own) is (changed == values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_one_changed_element_a_swap_and_another_length_change_it(dtype):
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
    assert tensor_checksum(torch.zeros(8, dtype=dtype)) != tensor_checksum(torch.zeros(9, dtype=dtype))


def test_a_swap_at_the_distance_of_a_power_of_two_changes_it():
    tensor = torch.zeros(2**18, dtype=torch.bfloat16)
    tensor[5] = 1.0
    assert tensor_checksum(tensor) != tensor_checksum(tensor.roll(2**17))


def test_layout_in_memory_does_not_matter_but_order_does():
    tensor = torch.randn(6, 4)
    assert tensor_checksum(tensor.t()) == tensor_checksum(tensor.t().contiguous()) != tensor_checksum(tensor)
    odd = torch.arange(9).bfloat16()
    assert tensor_checksum(odd[1:]) == tensor_checksum(odd[1:].clone())


def test_checksums_of_tensors_that_come_in_turn_are_those_of_each():
    tensors = {str(n): torch.randn(n).bfloat16() for n in (3, 700, 0, 12)}
    pending = PendingChecksums()
    assert pending.read() == {}
    for name, tensor in tensors.items():
        pending.add([(name, tensor)])
    pending.add([])
    assert pending.read() == tensor_checksums(tensors.items()) == {name: tensor_checksum(t) for name, t in tensors.items()}
