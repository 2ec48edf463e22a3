"""Memory behind reserved addresses, with a driver that counts what is created and mapped."""

from __future__ import annotations

import gc

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

    def cuMemGetAllocationGranularity(self, granularity, properties, kind) -> int:
        granularity._obj.value = 8
        return 0

    def cuMemAddressReserve(self, address, size, alignment, wanted, flags) -> int:
        address._obj.value = 4096
        self.is_reserved = True
        return 0

    def cuMemAddressFree(self, address, size) -> int:
        self.is_reserved = False
        return 0

    def cuMemCreate(self, handle, size, properties, flags) -> int:
        assert size.value == 16 and not self.holders
        self.holders.add("handle")
        return 0

    def cuMemRelease(self, handle) -> int:
        self.holders.remove("handle")
        return 0

    def cuMemMap(self, address, size, offset, handle, flags) -> int:
        if "mapping" in self.holders:
            return INVALID_VALUE
        self.holders.add("mapping")
        return 0

    def cuMemSetAccess(self, address, size, access, count) -> int:
        return NOT_PERMITTED if self.refuses_access else 0

    def cuMemUnmap(self, address, size) -> int:
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


def test_memory_is_taken_and_given_back_and_its_addresses_are_freed_in_the_end(driver):
    memory = MappedMemory(9, torch.device("cuda", 0))
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
    memory = MappedMemory(9, torch.device("cuda", 0))
    driver.refuses_access = True
    with pytest.raises(EngineError, match="the CUDA driver refused cuMemSetAccess with error 800"):
        memory.take()
    assert driver.holders == set()
    driver.refuses_access = False
    memory.take()
    assert driver.holders == {"mapping"}
