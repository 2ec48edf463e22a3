"""Which trainer rank and which engine gets which device of a cluster; plain arithmetic on what was granted.

one bundle for each node of the trainer, of --actor-num-gpus-per-node devices; one for each node of a critic apart from it; and
apart from both, one for each engine
colocated, engines of 2:    node 10.0.0.1: rank 0 1 | 2 3     node 10.0.0.2: rank 4 5 | 6 7
                            engine              0     1               engine 2     3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import accumulate, pairwise

from qwench.config.devices import DevicePlan
from qwench.config.sections.cluster import ClusterConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundles:
    """What is asked of a cluster: numbers of devices that must be on one node each."""

    trainer: tuple[int, ...]
    engines: tuple[int, ...]
    """Empty where the engines use the trainer's devices."""
    critic: tuple[int, ...] = ()
    """Empty where the critic is on the policy's ranks, or there is none."""

    @property
    def trained(self) -> tuple[int, ...]:
        """Return those of all trainer ranks: the policy's, then the critic's."""
        return self.trainer + self.critic

    @property
    def words(self) -> str:
        """Say what the devices are for."""
        critic = f"{sum(self.critic)} for the critic, " if self.critic else ""
        return f"{sum(self.trainer)} for the trainer, {critic}{sum(self.engines)} for engines apart from it"

    @property
    def num_devices(self) -> int:
        """Return how many devices that is in all."""
        return sum(self.trained) + sum(self.engines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """One device that was granted."""

    node_id: str
    address: str
    """IP address of the node."""
    device: int
    """Its number on the node, among the devices that processes see; 0 for every CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlace:
    """Where one engine runs."""

    node_id: str
    address: str
    devices: tuple[int, ...]
    """Their numbers, as `Seat.device`; empty on a CPU."""


def plan_bundles(cluster: ClusterConfig, devices: DevicePlan) -> Bundles:
    """Return what to ask of a cluster."""
    return Bundles(
        trainer=(cluster.actor_num_gpus_per_node,) * cluster.actor_num_nodes if devices.trains else (),
        engines=() if devices.shared else devices.engine_sizes,
        critic=devices.critic,
    )


def order_of(seats: Sequence[Seat]) -> list[int]:
    """Return the positions of seats in the order of ranks: by node (its IP address as a number), then by device.

    Neighbouring ranks thus share a node, as tensor parallelism and engines need it.
    """

    def key(position: int) -> tuple[int, int, str, int]:
        seat = seats[position]
        address = ip_address(seat.address)
        return address.version, int(address), seat.node_id, seat.device

    return sorted(range(len(seats)), key=key)


def engine_places(seats: Sequence[Seat], *, sizes: Sequence[int], with_numbers: bool) -> list[EnginePlace]:
    """Divide the trainer's devices, in order of ranks, among engines; CPUs have no numbers."""
    places = []
    for first, end in pairwise(accumulate(sizes, initial=0)):
        mine = seats[first:end]
        assert len({seat.node_id for seat in mine}) == 1, f"an engine would span nodes: {mine}"
        devices = tuple(seat.device for seat in mine) if with_numbers else ()
        places.append(EnginePlace(node_id=mine[0].node_id, address=mine[0].address, devices=devices))
    return places


def device_number(granted: str, visible: str | None) -> int:
    """Return the number, in a process that sees the devices `visible`, of the one that Ray calls `granted`.

    device_number("5", "4,5,6,7") -> 1; device_number("5", None) -> 5
    """
    return int(granted) if not visible else visible.split(",").index(granted)
