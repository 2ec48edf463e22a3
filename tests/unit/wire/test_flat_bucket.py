import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwench.errors import WeightSyncError
from qwench.wire.flat_bucket import (
    copy_all,
    entries_from_json,
    entries_of,
    entries_to_json,
    flatten_into,
    lay_out,
    size_bytes,
    unflatten,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8]


def test_wider_dtypes_come_first_and_bytes_are_those_of_the_tensors():
    bucket = [
        ("a", torch.tensor([[1.0, 2.0, 3.0]]).bfloat16()),
        ("s", torch.tensor([0.5, -2.0])),
        ("b", torch.ones(1).bfloat16()),
    ]
    entries = entries_of(bucket)
    assert [(entry.name, entry.dtype, entry.shape, entry.start, entry.end) for entry in entries] == [
        ("s", "float32", (2,), 0, 8),
        ("a", "bfloat16", (1, 3), 8, 14),
        ("b", "bfloat16", (1,), 14, 16),
    ]
    buffer = torch.zeros(20, dtype=torch.uint8)
    flatten_into(buffer, bucket, entries)
    # IEEE little endian: 0.5 = 3f000000, -2.0 = c0000000; bfloat16 1, 2, 3 = 3f80, 4000, 4040.
    assert bytes(buffer.tolist()).hex() == "0000003f000000c0" + "803f00404040" + "803f" + "00000000"


def octets(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=8))
def test_flattening_and_description_lose_nothing(tensors):
    bucket = [
        (str(i), torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(shape))
        for i, (dtype, shape) in enumerate(tensors)
    ]
    entries = entries_from_json(entries_to_json(entries_of(bucket)))
    assert entries == entries_of(bucket)
    buffer = torch.empty(size_bytes(entries), dtype=torch.uint8)
    flatten_into(buffer, bucket, entries)
    back = dict(unflatten(buffer, entries))
    for name, tensor in bucket:
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert octets(back[name]) == octets(tensor)


def test_a_dtype_that_weights_do_not_have_is_named():
    with pytest.raises(WeightSyncError, match="weight 'x' has dtype int64"):
        lay_out([("x", torch.int64, [2])])


@pytest.mark.parametrize(
    ("change", "word"),
    [({"end": 9}, "gaps"), ({"start": -8, "end": 0}, "gaps"), ({"shape": [-2]}, "negative"), ({"dtype": "int64"}, "int64"),
     ({"shape": 3}, "is not one")],
)  # fmt: skip
def test_a_description_from_elsewhere_is_checked(change, word):
    (entry,) = entries_to_json(lay_out([("x", torch.float32, [2])]))
    with pytest.raises(WeightSyncError, match=word):
        entries_from_json([{**entry, **change}])


def test_small_and_large_tensors_are_copied():
    sizes = (3, 2**22, 2**22 - 1)
    sources = [torch.arange(size).remainder(251).to(torch.uint8) for size in sizes]
    targets = [torch.full((size,), 255, dtype=torch.uint8) for size in sizes]
    copy_all(targets, sources)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
