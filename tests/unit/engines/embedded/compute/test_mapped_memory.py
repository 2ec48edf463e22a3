"""Memory behind reserved addresses, with a driver that counts what is created and mapped."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from qwench.engines.embedded.compute import mapped_memory
from qwench.engines.embedded.compute.mapped_memory import MappedMemory
from qwench.errors import EngineError

NOT_PERMITTED = 800
INVALID_VALUE = 1


class Driver:
    """CUDA's calls for one range of addresses. Created memory is freed when neither its handle nor a mapping holds it."""

    def __init__(self) -> None:
        self.refuses_access = False
        self.holders: set[str] = set()
        self.is_reserved = False
        self.handle_types = 0

    def cuMemGetAllocationGranularity(self, granularity, properties, kind) -> int:
        assert kind.value == 0, "the least granularity"
        granularity._obj.value = 8
        return 0

    def cuMemAddressReserve(self, address, size, alignment, wanted, flags) -> int:
        assert (size.value, alignment.value, wanted.value, flags.value) == (16, 0, 0, 0)
        address._obj.value = 4096
        self.is_reserved = True
        return 0

    def cuMemAddressFree(self, address, size) -> int:
        self.is_reserved = False
        return 0

    def cuMemCreate(self, handle, size, properties, flags) -> int:
        asked = properties._obj
        assert (asked.type, asked.handle_types, asked.location.type, asked.location.id) == (1, self.handle_types, 1, 3)
        assert size.value == 16 and flags.value == 0 and not self.holders
        handle._obj.value = 70
        self.holders.add("handle")
        return 0

    def cuMemRelease(self, handle) -> int:
        assert handle.value == 70
        self.holders.remove("handle")
        return 0

    def cuMemMap(self, address, size, offset, handle, flags) -> int:
        assert (address.value, size.value, offset.value, handle.value, flags.value) == (4096, 16, 0, 70, 0)
        if "mapping" in self.holders:
            return INVALID_VALUE
        self.holders.add("mapping")
        return 0

    def cuMemSetAccess(self, address, size, access, count) -> int:
        given = access._obj
        assert (address.value, size.value, count.value) == (4096, 16, 1)
        assert (given.location.type, given.location.id, given.flags) == (1, 3, 3), "read and write from GPU 3"
        return NOT_PERMITTED if self.refuses_access else 0

    def cuMemRetainAllocationHandle(self, handle, address) -> int:
        assert address.value == 4096
        handle._obj.value = 70
        self.holders.add("handle")
        return 0

    def cuMemExportToShareableHandle(self, descriptor, handle, kind, flags) -> int:
        assert (handle.value, kind.value, flags.value) == (70, 1, 0)
        descriptor._obj.value = 5
        return 0

    def cuMemImportFromShareableHandle(self, handle, descriptor, kind) -> int:
        assert kind.value == 1
        os.fstat(descriptor.value)  # still open
        handle._obj.value = 70
        self.holders.add("handle")
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device) -> int:
        value._obj.value = (attribute.value, device.value) == (103, 2)
        return 0

    def cuMemUnmap(self, address, size) -> int:
        assert (address.value, size.value) == (4096, 16)
        if "mapping" not in self.holders:
            return INVALID_VALUE
        self.holders.remove("mapping")
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(mapped_memory, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return driver


def test_structures_lie_as_in_cudas_header():
    """cuda.h: an enum is 4 bytes, and CUmemAllocationProp ends with a struct of 8."""
    access, properties = mapped_memory._Access, mapped_memory._Properties
    fields = [(kind, name) for kind in (access, properties) for name, _ in kind._fields_]
    assert [(name, getattr(kind, name).offset, getattr(kind, name).size) for kind, name in fields] == [
        ("location", 0, 8), ("flags", 8, 4),
        ("type", 0, 4), ("handle_types", 4, 4), ("location", 8, 8), ("metadata", 16, 8), ("flags", 24, 8),
    ]  # fmt: skip


def test_shared_memory_is_a_descriptor_that_another_process_maps_once(driver, tmp_path):
    driver.handle_types = 1
    memory = MappedMemory(9, torch.device("cuda", 3), shared=True)
    memory.take()
    assert (memory.address, memory.descriptor(), driver.holders) == (4096, 5, {"mapping"})
    memory.give_back()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    memory.take_from(descriptor)
    assert driver.holders == {"mapping"}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert [mapped_memory.can_share(device) for device in (2, 1)] == [True, False]


def test_memory_is_taken_and_given_back_and_its_addresses_are_freed_in_the_end(driver):
    memory = MappedMemory(9, torch.device("cuda", 3))
    for _ in range(2):
        memory.take()
        assert driver.holders == {"mapping"}
        memory.give_back()
        assert driver.holders == set()
    memory.take()
    del memory
    gc.collect()
    assert driver.holders == set() and not driver.is_reserved


def test_memory_without_access_is_given_back_and_can_be_taken_later(driver):
    memory = MappedMemory(9, torch.device("cuda", 3))
    driver.refuses_access = True
    with pytest.raises(EngineError, match="the CUDA driver refused cuMemSetAccess with error 800"):
        memory.take()
    assert driver.holders == set()
    driver.refuses_access = False
    memory.take()
    assert driver.holders == {"mapping"}
