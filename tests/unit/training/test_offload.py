"""Host copies: exact, and the device's memory really goes back."""

import pytest
import torch
from torch import Tensor

from qwench.training import offload
from qwench.training.offload import HostCopy, has_room


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


@pytest.mark.parametrize(("num_bytes", "beside", "fits"), [(8, 24, True), (8, 23, False), (0, 0, True), (0, -1, False)])
def test_a_third_of_what_is_free_beside_8_gib_may_hold_weights_while_a_model_scores(num_bytes: int, beside: int, fits: bool):
    assert has_room(num_bytes, free=8 * 2**30 + beside) is fits


ENOUGH = 8 * 2**30 + 3 * 20


@pytest.mark.parametrize("free", [None, ENOUGH - 1, ENOUGH], ids=["host", "no room", "room"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_in_copies_give_way_to_what_was_there(monkeypatch: pytest.MonkeyPatch, free: int | None, dtype: torch.dtype):
    monkeypatch.setattr(offload, "free_bytes", lambda device: free)
    tensors, exchanges = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0, 5.0]])], list[int]()
    exchange, copy = HostCopy._exchange, HostCopy(tensors, dtype=dtype)
    monkeypatch.setattr(HostCopy, "_exchange", lambda self: (exchanges.append(1), exchange(self)))
    for tensor in tensors:
        tensor += 10
    for _ in range(2):
        with pytest.raises(KeyError), copy.swapped_in():
            assert [tensor.tolist() for tensor in tensors] == [[1, 2], [[3, 4, 5]]]
            raise KeyError
        assert [tensor.tolist() for tensor in tensors] == [[11, 12], [[13, 14, 15]]]
    # Without room, tensors and copies change places, unless the copies would round what they get.
    assert len(exchanges) == (4 if free != ENOUGH and dtype == torch.float32 else 0)


def test_what_was_there_waits_on_the_host_where_free_memory_lies_in_too_small_pieces(monkeypatch: pytest.MonkeyPatch):
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0, 5.0]])]
    copy, held, exchanges = HostCopy(tensors, dtype=torch.float32), list[Tensor](), list[int]()
    monkeypatch.setattr(offload, "free_bytes", lambda device: ENOUGH)
    exchange, clone = HostCopy._exchange, Tensor.clone

    def clone_one(tensor: Tensor) -> Tensor:
        if held and not exchanges:
            raise torch.OutOfMemoryError
        held.append(tensor)
        return clone(tensor)

    monkeypatch.setattr(HostCopy, "_exchange", lambda self: (exchanges.append(1), exchange(self)))
    monkeypatch.setattr(Tensor, "clone", clone_one)
    tensors[0] += 10
    with copy.swapped_in():
        assert [tensor.tolist() for tensor in tensors] == [[1, 2], [[3, 4, 5]]]
    assert [tensor.tolist() for tensor in tensors] == [[11, 12], [[3, 4, 5]]]
    assert len(exchanges) == 2


def test_work_of_the_device_has_ended_when_the_device_holds_again_what_was_there(monkeypatch: pytest.MonkeyPatch):
    tensor, seen = torch.tensor([1.0]), list[list[float]]()
    copy = HostCopy([tensor])
    monkeypatch.setattr(offload, "free_bytes", lambda device: 2**40)
    monkeypatch.setattr(HostCopy, "_synchronize", lambda self: seen.append(tensor.tolist()))
    tensor.fill_(2.0)
    with copy.swapped_in():
        pass
    assert seen == [[1.0], [2.0]]


@pytest.mark.parametrize("free", [None, 2**40])
def test_what_is_written_while_copies_are_swapped_in_is_in_them(monkeypatch: pytest.MonkeyPatch, free: int | None):
    monkeypatch.setattr(offload, "free_bytes", lambda device: free)
    tensor = torch.tensor([1.0, 2.0])
    copy = HostCopy([tensor])
    with copy.swapped_in(for_writing=True):
        tensor.fill_(7.0)
    assert tensor.tolist() == [1.0, 2.0]
    with copy.swapped_in():
        assert tensor.tolist() == [7.0, 7.0]
