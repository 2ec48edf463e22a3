"""Buffers that buckets use in turn."""

from __future__ import annotations

import torch

from qwench.weights.buffer_ring import BufferRing

CPU = torch.device("cpu")


def test_each_place_is_used_again_in_its_turn_and_grows_when_it_must():
    ring = BufferRing(2)
    first, second = ring.next(10, CPU), ring.next(20, CPU)
    assert first is not second
    assert ring.next(7, CPU) is first and ring.next(20, CPU) is second
    grown = ring.next(11, CPU)
    assert grown is not first and grown.tensor.numel() == 11
    assert first.file is not None and not first.file.exists()
    files = [grown.file, second.file]
    assert all(file is not None and file.exists() for file in files)
    ring.close()
    assert not any(file.exists() for file in files)
