"""Host copies: exact, and the device's memory really goes back."""

import pytest
import torch

from qwench.training.offload import HostCopy


def test_load_brings_back_what_was_there():
    tensors = [torch.randn(5), torch.randn(2, 3, dtype=torch.float64)]
    expected = [tensor.clone() for tensor in tensors]
    copy = HostCopy(tensors)
    for tensor in tensors:
        tensor.zero_()
    copy.load()
    assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(tensors, expected, strict=True))


def test_a_narrower_copy_loads_the_rounded_values():
    tensor = torch.tensor([1.0, 1.00001, 3.14159265])
    HostCopy([tensor], dtype=torch.bfloat16).load()
    assert tensor.tolist() == [1.0, 1.0, 3.140625]


def test_release_frees_the_storage_and_restore_fills_it_for_every_view():
    padded = torch.arange(6.0)
    shard = padded[:4].view(2, 2)
    copy = HostCopy([shard])
    copy.release()
    assert padded.untyped_storage().nbytes() == 0
    copy.restore()
    assert padded.untyped_storage().nbytes() == 24
    assert shard.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert padded[:4].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_memory_that_several_tensors_share_is_taken_once(monkeypatch: pytest.MonkeyPatch):
    flat = torch.arange(6.0)
    copy = HostCopy([flat[:2], flat[2:5], torch.ones(3)])
    taken: list[int] = []
    resize = torch.UntypedStorage.resize_

    def record(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
        taken.append(num_bytes)
        return resize(storage, num_bytes)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", record)
    copy.release()
    copy.restore()
    assert taken == [0, 0, 24, 12]
    assert flat[:5].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
