"""The transport of the weights to each engine in another process, by its place and those of the trainer's ranks.

same machine, each of its devices is one of a trainer rank's    ipc        the engine opens that rank's bucket in place
other devices of the same kind, or an unknown place            broadcast  rank 0 broadcasts to all such engines at once
another kind of device                                          disk       rank 0 writes a checkpoint, the engine reads it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwench.errors import WeightSyncError
from qwench.wire.addresses import EngineAddress, Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """How one engine gets its weights."""

    address: EngineAddress
    transport: Literal["ipc", "broadcast", "disk"]
    ranks: tuple[int, ...]
    """The trainer ranks that serve it: with ipc one for each of its tensor-parallel ranks, else rank 0. The first one asks."""


def plan_routes(
    addresses: Sequence[EngineAddress],
    placements: Sequence[Placement | None],
    ranks: Sequence[Placement],
    *,
    transport: str,
) -> list[Route]:
    """Return a route for each engine; the same on every rank that asks with the same arguments.

    Args:
        addresses: of the engines.
        placements: of the engines, as far as known.
        ranks: where each trainer rank holds its full tensors.
        transport: `nccl` for what follows from the places, or the one that must be used.

    Raises:
        WeightSyncError: `ipc` must be used and an engine shares no device with a trainer rank.
    """
    return [_route(address, placement, ranks, transport) for address, placement in zip(addresses, placements, strict=True)]


def _route(address: EngineAddress, placement: Placement | None, ranks: Sequence[Placement], transport: str) -> Route:
    neighbours = None if placement is None else _neighbours(placement, ranks)
    if transport == "ipc" and neighbours is None:
        raise WeightSyncError(
            f"--update-weight-transport ipc cannot reach the engine at {address.base_url}: it runs on {placement}, the trainer "
            f"on {list(ranks)}; leave the flag out, or place the engine on the trainer's devices."
        )
    if neighbours is not None and transport in ("nccl", "ipc"):
        return Route(address=address, transport="ipc", ranks=neighbours)
    if transport == "disk" or (transport == "nccl" and placement is not None and placement.on_cpu != ranks[0].on_cpu):
        return Route(address=address, transport="disk", ranks=(0,))
    return Route(address=address, transport="broadcast", ranks=(0,))


def _neighbours(engine: Placement, ranks: Sequence[Placement]) -> tuple[int, ...] | None:
    """Return a trainer rank on each of the engine's devices, or None if one has none."""
    by_device = {(rank.host, rank.devices[0]): index for index, rank in reversed(list(enumerate(ranks)))}
    found = [by_device.get((engine.host, device)) for device in engine.devices]
    return tuple(index for index in found if index is not None) if None not in found else None
