"""Parts of tensors by hand, and memory that is used again without overwriting what is in use."""

from __future__ import annotations

import pytest
import torch

from qwench.models.tensor_parts import HostMemory, Part

MATRIX = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Part(start=1, stop=3), [[4, 5, 6, 7], [8, 9, 10, 11]]),
        (Part(start=1, stop=3, dim=1), [[1, 2], [5, 6], [9, 10]]),
        (Part(start=2, stop=9), [[8, 9, 10, 11]]),
        (Part(start=4, stop=9, dim=1), [[], [], []]),
    ],
    ids=str,
)
def test_a_part_is_a_range_of_one_dimension(part: Part, expected: list[list[int]]) -> None:
    assert part.of(MATRIX).tolist() == expected
    assert part.shape_in(MATRIX.shape) == part.of(MATRIX).shape


def test_memory_is_the_callers_until_it_is_cleared() -> None:
    memory = HostMemory()
    first = memory.take((3,), torch.bfloat16).fill_(1)
    second = memory.take((2, 2), torch.float32).fill_(2)
    assert (first.tolist(), second.tolist()) == ([1.0] * 3, [[2.0] * 2] * 2)
    memory.clear()
    again = memory.take((4,), torch.float32)
    memory.clear()
    assert memory.take((1,), torch.float32).data_ptr() == again.data_ptr()
    assert memory.take((0, 5), torch.float32).shape == (0, 5)


def test_tensors_share_memory_that_suffices_at_aligned_places() -> None:
    memory = HostMemory()
    whole = memory.take((192,), torch.uint8)
    memory.clear()
    parts = [memory.take((size,), torch.uint8) for size in (1, 64, 63)]
    assert [part.data_ptr() - whole.data_ptr() for part in parts] == [0, 64, 128]
    larger = memory.take((65,), torch.uint8)
    assert larger.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    assert larger.untyped_storage().nbytes() == 192 + 65
