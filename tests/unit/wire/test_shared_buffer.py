"""Bytes that two processes of one machine share, and what is refused as a handle of them."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.errors import WeightSyncError
from qwench.wire import memory_files, shared_buffer
from qwench.wire.shared_buffer import OpenBuffers, SharedBuffer, open_buffer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """Return the folder that is memory here."""
    monkeypatch.setattr(memory_files, "_MEMORY", tmp_path)
    return tmp_path


def num_open():
    return len([*Path("/proc/self/fd").iterdir()])


def test_a_receiver_writes_and_reads_the_bytes_of_the_sender_until_they_are_closed(memory):
    before = num_open()
    buffer = SharedBuffer.allocate(3, CPU)
    assert (buffer.tensor.dtype, buffer.file.parent, buffer.file.stat().st_size) == (torch.uint8, memory, 3)
    handle = json.loads(json.dumps(buffer.handle()))
    assert handle == {"kind": "file", "path": str(buffer.file), "num_bytes": 3}
    opened = OpenBuffers()
    tensor = opened.open(handle)
    assert opened.open(dict(handle)) is tensor
    buffer.tensor.copy_(torch.tensor([1, 2, 3]))
    assert tensor.tolist() == [1, 2, 3]
    tensor[0] = 7
    assert buffer.tensor.tolist() == [7, 2, 3]
    opened.close()
    assert opened.open(handle) is not tensor
    buffer.close()
    assert (buffer.tensor.numel(), list(memory.iterdir())) == (0, [])
    buffer.close()
    assert num_open() <= before + 2, "both ends hold maps, and one file of the sender's at most"


def test_memory_without_room_is_said_with_what_to_do_and_keeps_no_file(memory, monkeypatch):
    def refuse(descriptor, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = num_open()
    with pytest.raises(WeightSyncError) as refused:
        SharedBuffer.allocate(5, CPU)
    assert str(refused.value) == (
        f"{memory} has no room for a bucket of weights of 5 bytes (No space left on device); make it larger "
        "(docker run --shm-size), or lower --update-weight-buffer-size."
    )
    assert (list(memory.iterdir()), num_open()) == ([], before)


def test_memory_is_taken_at_once_or_where_a_system_cannot_as_it_is_written(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *words: asked.append(words[1:]) or os.ftruncate(words[0], words[2]))
    assert SharedBuffer.allocate(5, CPU).tensor.numel() == 5
    monkeypatch.delattr(os, "posix_fallocate")
    assert SharedBuffer.allocate(6, CPU).tensor.numel() == 6
    assert asked == [(0, 5)]


def test_what_is_no_handle_of_this_machine_is_refused(memory, tmp_path_factory):
    buffer = SharedBuffer.allocate(3, CPU)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / buffer.file.name
    elsewhere.write_bytes(b"abc")
    (memory / "other").write_bytes(b"abc")
    link = buffer.file.with_name(f"{buffer.file.name}-link")
    link.symlink_to(buffer.file)
    folder = buffer.file.with_name(f"{buffer.file.name}-folder")
    folder.mkdir()
    handle, before = buffer.handle(), num_open()
    for changed, why in (
        ({"path": str(elsewhere)}, "is not a shared buffer"),
        ({"path": str(memory / "other")}, "is not a shared buffer"),
        ({"path": str(link)}, "Too many levels of symbolic links"),
        ({"path": str(folder)}, "Is a directory"),
        ({"path": f"{buffer.file}-gone"}, "No such file"),
        ({"path": None}, "TypeError"),
        ({"num_bytes": 4}, "is not this user's file of 4 bytes"),
        ({"kind": "cuda"}, "KeyError"),
    ):
        with pytest.raises(WeightSyncError, match=rf"^the shared buffer .* cannot be opened: .*{why}.*; sender and "):
            open_buffer({**handle, **changed})
    for absent in ({}, {"kind": "file"}):
        with pytest.raises(WeightSyncError, match="KeyError"):
            open_buffer(absent)
    assert num_open() == before


def test_a_file_of_another_user_is_refused(monkeypatch):
    handle = SharedBuffer.allocate(3, CPU).handle()
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    with pytest.raises(WeightSyncError, match="is not this user's file of 3 bytes"):
        open_buffer(handle)


def test_the_handle_of_a_gpu_names_all_that_opens_its_memory(monkeypatch):
    opened, waited, storage = [], [], torch.UntypedStorage(8)
    parts = (0, b"storage", 8, 2, b"counter", 4, b"event", True)
    shared = SimpleNamespace(is_cuda=True, device=CPU, untyped_storage=lambda: SimpleNamespace(_share_cuda_=lambda: parts))
    monkeypatch.setattr(shared_buffer, "device_name", lambda device: "GPU-a")
    monkeypatch.setattr(shared_buffer, "local_gpu", {"GPU-a": SimpleNamespace(index=3)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: waited.append(device)))
    handle = json.loads(json.dumps(SharedBuffer(shared, None).handle()))
    assert waited == [CPU], "the receiver sees what was written before"

    def new(*words):
        opened.append(words)
        return storage

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", new)
    monkeypatch.setattr(torch, "empty", lambda *sizes, device, dtype: torch.zeros(sizes, dtype=dtype))
    assert open_buffer(handle).untyped_storage().data_ptr() == storage.data_ptr()
    assert opened == [(3, b"storage", 8, 2, b"counter", 4, b"event", True)]
