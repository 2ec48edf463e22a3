"""Kernel calls that are recorded once and played again over other inputs."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from qwench.models.decoder.native import elementwise
from qwench.models.decoder.native.products import linear
from qwench.models.decoder.native.recording import Recording
from tests.compiler import needs_compiler

pytestmark = needs_compiler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 8])  # few rows are PyTorch's
@torch.inference_mode()
def test_played_calls_give_the_bits_of_a_new_computation(dtype, rows):
    source = torch.Generator().manual_seed(0)
    table, weight = torch.randn(50, 16, generator=source).to(dtype), torch.randn(40, 16, generator=source).to(dtype)
    norm, bias = torch.randn(16, generator=source).to(dtype), torch.randn(40, generator=source).to(dtype)
    tokens = torch.arange(rows, dtype=torch.int32)

    def compute():
        summed, normed = elementwise.add_rms_norm(functional.embedding(tokens, table), None, norm, 1e-6)
        gate, up = linear(normed, weight, bias).split([20, 20], dim=1)
        # Transposed and back: a reshape that copies.
        return summed, elementwise.silu_mul(gate, up).T.reshape(20, rows).T.float()

    with Recording() as recorded:
        found = compute()
    assert recorded.is_complete
    for first in (0, 20, 41):
        tokens.copy_(torch.arange(first, first + rows))
        recorded.play()
        assert all(torch.equal(one, other) for one, other in zip(found, compute(), strict=True))


def _double(x):
    return elementwise.add_rms_norm(x, x, torch.ones(8), 1e-6)[0]


@pytest.mark.parametrize("outside", [lambda x: x + x, lambda x: x.mul_(2), lambda x: x * x.sum().item()])
def test_other_operations_make_a_recording_useless_and_change_no_result(outside):
    x = torch.ones(2, 8)
    with Recording() as recorded:
        made = _double(x)
        y = outside(made)
    assert not recorded.is_complete
    assert torch.equal(y, outside(torch.full((2, 8), 2.0)))
    made.zero_()
    recorded.play()
    assert not made.any()


@pytest.mark.parametrize(("num_floats", "fits"), [(2**20, True), (2**20 + 1, False)])
def test_tensors_are_kept_up_to_four_mebibytes(num_floats, fits):
    with Recording() as recorded:
        kept = StorageWeakRef(torch.empty(2**19).untyped_storage())
        torch.empty(num_floats - 2**19)
    assert recorded.is_complete == fits
    assert kept.expired() != fits


def test_another_thread_is_not_recorded():
    x, results = torch.ones(2, 8), []
    with Recording() as recorded:
        other = threading.Thread(target=lambda: results.append(_double(x)))
        other.start()
        other.join()
    results[0].zero_()
    recorded.play()
    assert not results[0].any()
