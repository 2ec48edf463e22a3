"""Places of the weights of engines and trainer ranks, which decide the transport; addresses of engines, and their ports."""

from __future__ import annotations

import platform
import random
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

CPU = "cpu"
_RANDOM_NODE_BIT = 1 << 40
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
"""Below the ports that Linux gives to outgoing connections (32768 to 60999 by default): none of those can take a port away
between this choice and the server's start."""
_ATTEMPTS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The machine and the devices of one engine or of one trainer rank."""

    host: str
    """As `host_name` names it there."""
    devices: tuple[str, ...]
    """One for each tensor-parallel rank: `cpu`, or the UUID of a GPU."""

    @property
    def on_cpu(self) -> bool:
        """Tell whether the weights lie in the machine's own memory."""
        return set(self.devices) == {CPU}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineAddress:
    """Address of an engine's server, for the process that sends it weights."""

    base_url: str
    token: str | None
    kind: str
    """Name of its `engines.kinds.kind.EngineKind`: kinds take weights in different forms."""
    placement: Placement | None
    """None: not known here; `qwench serve` says it in `/server_info`."""
    start: int = 0
    """How many times the server restarted: a new process is in none of the old one's groups."""
    label: str = ""
    """Its name in messages, such as `engine server 0`; empty: only its address is known."""


def host_name() -> str:
    """Return a name that is equal for processes of one machine (that see the same network card).

    Where there is no card, `uuid` draws a number in every process (RFC 9562, 6.10, sets a bit in it). Then Linux's number of
    this boot is used.
    """
    node = uuid.getnode()
    if not node & _RANDOM_NODE_BIT:
        return f"{platform.node()}/{node:012x}"
    return f"{platform.node()}/{_BOOT_ID.read_text(encoding='ascii').strip() if _BOOT_ID.exists() else ''}"


def device_name(device: torch.device) -> str:
    """Return the name of a device of this machine; the same in every process, under any CUDA_VISIBLE_DEVICES."""
    if device.type == "cpu":
        return CPU
    return str(torch.cuda.get_device_properties(device).uuid)


def gpu_names(gpu_ids: Sequence[int]) -> tuple[str, ...]:
    """Return the names of GPUs by their numbers in this process."""
    return tuple(device_name(torch.device("cuda", gpu_id)) for gpu_id in gpu_ids)


def local_gpu(name: str) -> torch.device:
    """Return this process's device for the GPU called `name`.

    Raises:
        KeyError: this process does not see it.
    """
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if device_name(device) == name:
            return device
    raise KeyError(name)


def placement_of(*devices: torch.device) -> Placement:
    """Return where this process holds weights that lie on `devices`."""
    return Placement(host=host_name(), devices=tuple(device_name(device) for device in devices))


def http_url(host: str, port: int) -> str:
    """Return the URL of a server; an IPv6 address stands in brackets."""
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"


def family_of(host: str) -> socket.AddressFamily:
    """Return the family of an address; names count as IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listen(host: str, port: int = 0, *, backlog: int | None = None) -> socket.socket:
    """Return a socket that listens at an address of this machine; port 0 is a free one."""
    return socket.create_server((host, port), family=family_of(host), backlog=backlog)


def unused_port(host: str) -> int:
    """Return a port on which no process listens now.

    Raises:
        OSError: `host` is not an address of this machine.
    """
    for port in random.SystemRandom().sample(range(_FIRST_PORT, _LAST_PORT), _ATTEMPTS):
        try:
            listen(host, port).close()
        except OSError:
            continue
        return port
    with listen(host) as free:
        return int(free.getsockname()[1])
