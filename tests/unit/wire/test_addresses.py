"""The name by which processes know that they run on one machine."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from qwench.wire import addresses
from qwench.wire.addresses import (
    CPU,
    Placement,
    gpu_names,
    host_name,
    http_url,
    listen,
    local_gpu,
    placement_of,
    unused_port,
)
from tests.deadlines import patient

RANDOM_NODE = 0x0100_0000_0000
"""The bit that says that a node id is no network card's."""


def test_every_process_of_this_machine_gets_the_same_name() -> None:
    asked = [sys.executable, "-c", "from qwench.wire.addresses import host_name; print(host_name())"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True, timeout=patient(120)).stdout.strip() == host_name()


def test_without_a_network_card_the_name_does_not_change_with_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = set()
    for drawn in (1, 2):
        monkeypatch.setattr(uuid, "getnode", lambda drawn=drawn: RANDOM_NODE | drawn)
        names.add(host_name())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert names == {f"{platform.node()}/{boot}"}
    monkeypatch.setattr(addresses, "_BOOT_ID", tmp_path / "absent")
    assert host_name() == f"{platform.node()}/"


def test_machines_of_one_name_with_different_cards_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for card in (0x0242_AC11_0002, 0x0242_AC11_0003):
        monkeypatch.setattr(uuid, "getnode", lambda card=card: card)
        names.add(host_name())
    assert names == {f"{platform.node()}/0242ac11000{number}" for number in (2, 3)}


class Gpu:
    """What torch says of a GPU."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid


def test_weights_on_the_host_lie_on_this_machine() -> None:
    assert placement_of(torch.device("cpu"), torch.device("cpu")) == Placement(host=host_name(), devices=(CPU, CPU))


def test_a_gpu_is_found_by_its_name_under_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["GPU-a", "GPU-b"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu(names[device.index]))
    assert gpu_names([1, 0]) == ("GPU-b", "GPU-a")
    assert [local_gpu(name) for name in names] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert placement_of(torch.device("cuda", 1)) == Placement(host=host_name(), devices=("GPU-b",))
    with pytest.raises(KeyError, match="GPU-c"):
        local_gpu("GPU-c")


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("node", "node"), ("::1", "[::1]"), ("[::1]", "[::1]")]
)
def test_an_address_of_ipv6_stands_in_brackets(host: str, shown: str) -> None:
    assert http_url(host, 80) == f"http://{shown}:80"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_ports_of_ipv6_addresses_can_be_listened_on() -> None:
    with listen("::1", unused_port("::1")) as listener, pytest.raises(OSError, match="in use"):
        listen("::1", listener.getsockname()[1])


def test_an_unused_port_can_be_listened_on_and_an_address_elsewhere_has_none() -> None:
    with socket.create_server(("127.0.0.1", unused_port("127.0.0.1"))) as listener:
        assert 20_000 <= listener.getsockname()[1] < 32_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(addresses, "_ATTEMPTS", 0)  # every one that was drawn was taken
        assert unused_port("127.0.0.1") > 1024
    with pytest.raises(OSError, match="assign requested address"):
        unused_port("192.0.2.1")  # reserved for documentation
