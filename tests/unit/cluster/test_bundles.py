"""Which device goes to whom: worked out by hand for the layouts of the recipes, and what must hold for any cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.cluster.bundles import Bundles, Seat, device_number, engine_places, order_of, plan_bundles
from qwench.config.devices import DevicePlan
from qwench.config.sections.cluster import ClusterConfig

SHARED = {"trains": True, "generates": True, "shared": True}
APART = {"trains": True, "generates": True, "shared": False}
TRAINS = {"trains": True, "generates": False, "shared": False}
GENERATES = {"trains": False, "generates": True, "shared": False}


def seat(address: str, device: int) -> Seat:
    return Seat(node_id=f"node-{address}", address=address, device=device)


@pytest.mark.parametrize(
    ("cluster", "roles", "num_engines", "size", "expected"),
    [
        ({"actor_num_gpus_per_node": 8, "colocate": True}, SHARED, 4, 2, Bundles(trainer=(8,), engines=())),
        ({"actor_num_gpus_per_node": 8, "actor_num_nodes": 2}, SHARED, 2, 8, Bundles(trainer=(8, 8), engines=())),
        ({"actor_num_gpus_per_node": 4, "rollout_num_gpus": 4}, APART, 2, 2, Bundles(trainer=(4,), engines=(2, 2))),
        ({"actor_num_gpus_per_node": 4}, TRAINS, 0, 1, Bundles(trainer=(4,), engines=())),
        ({"actor_num_gpus_per_node": 4}, GENERATES, 2, 2, Bundles(trainer=(), engines=(2, 2))),
        ({"actor_num_gpus_per_node": 4}, {**APART, "critic": (2, 2)}, 1, 2, Bundles(trainer=(4,), critic=(2, 2), engines=(2,))),
    ],
)
def test_bundles_of_a_layout(cluster, roles, num_engines, size, expected):
    devices = DevicePlan(
        on_gpus=False,
        **roles,
        engine_sizes=(size,) * num_engines,
        offload_train=False,
        offload_rollout=False,
        weights_may_alias=False,
    )
    assert plan_bundles(ClusterConfig(**cluster), devices) == expected


def test_devices_are_counted_once_where_they_are_shared():
    assert Bundles(trainer=(4, 4), engines=(2,)).num_devices == 10
    assert Bundles(trainer=(4, 4), engines=()).num_devices == 8
    apart = Bundles(trainer=(4, 4), critic=(2,), engines=(1,))
    assert (apart.num_devices, apart.words) == (11, "8 for the trainer, 2 for the critic, 1 for engines apart from it")


def test_ranks_are_ordered_by_address_as_a_number_and_by_device():
    seats = [seat("10.0.0.10", 0), seat("10.0.0.9", 1), seat("10.0.0.10", 1), seat("10.0.0.9", 0)]
    assert order_of(seats) == [3, 1, 0, 2]
    assert order_of([seat("::1", 0), seat("10.0.0.9", 0)]) == [1, 0], "IPv4 comes before IPv6"


def test_colocated_engines_have_neighbouring_devices_of_one_node():
    seats = [seat(address, device) for address in ("10.0.0.1", "10.0.0.2") for device in (0, 1, 4, 5)]
    places = engine_places(seats, sizes=(2, 2, 2, 2), with_numbers=True)
    assert [(place.address, place.devices) for place in places] == [
        ("10.0.0.1", (0, 1)),
        ("10.0.0.1", (4, 5)),
        ("10.0.0.2", (0, 1)),
        ("10.0.0.2", (4, 5)),
    ]
    assert engine_places(seats, sizes=(4, 4), with_numbers=False)[1].devices == ()


@given(
    num_nodes=st.integers(1, 4),
    per_node=st.sampled_from([1, 2, 4, 8]),
    size=st.sampled_from([1, 2, 4, 8]),
    shuffled=st.randoms(use_true_random=False),
)
def test_every_device_serves_one_engine_whatever_order_it_was_granted_in(num_nodes, per_node, size, shuffled):
    size = min(size, per_node)
    seats = [seat(f"10.0.{node}.1", device) for node in range(num_nodes) for device in range(per_node)]
    shuffled.shuffle(seats)
    ordered = [seats[i] for i in order_of(seats)]
    places = engine_places(ordered, sizes=(size,) * (len(ordered) // size), with_numbers=True)
    served = [(place.address, device) for place in places for device in place.devices]
    assert served == [(one.address, one.device) for one in ordered]
    assert sorted(served) == sorted((one.address, one.device) for one in seats)


@pytest.mark.parametrize(
    ("granted", "visible", "number"), [("5", "4,5,6,7", 1), ("5", None, 5), ("5", "", 5), ("GPU-b", "GPU-a,GPU-b", 1)]
)
def test_device_is_numbered_among_those_a_process_sees(granted, visible, number):
    assert device_number(granted, visible) == number
