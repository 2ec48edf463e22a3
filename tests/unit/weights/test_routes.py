import pytest

from qwench.errors import WeightSyncError
from qwench.weights.routes import plan_routes
from qwench.wire.addresses import EngineAddress, Placement

RANKS = [Placement(host="a", devices=(f"GPU-{i}",)) for i in range(4)]
CPU_RANK = [Placement(host="a", devices=("cpu",))]


def route(placement, ranks, transport="nccl"):
    address = EngineAddress(base_url="http://e", token=None, kind="sglang", placement=placement)
    (planned,) = plan_routes([address], [placement], ranks, transport=transport)
    return planned.transport, planned.ranks


@pytest.mark.parametrize(
    ("placement", "ranks", "expected"),
    [
        (Placement(host="a", devices=("GPU-2", "GPU-3")), RANKS, ("ipc", (2, 3))),
        (Placement(host="a", devices=("GPU-3", "GPU-7")), RANKS, ("broadcast", (0,))),
        (Placement(host="b", devices=("GPU-2",)), RANKS, ("broadcast", (0,))),
        (None, RANKS, ("broadcast", (0,))),
        (Placement(host="a", devices=("cpu",)), CPU_RANK * 3, ("ipc", (0,))),
        (Placement(host="b", devices=("cpu",)), CPU_RANK, ("broadcast", (0,))),
        (Placement(host="a", devices=("GPU-0",)), CPU_RANK, ("disk", (0,))),
        (Placement(host="a", devices=("cpu",)), RANKS, ("disk", (0,))),
    ],
    ids=["same GPUs", "one GPU elsewhere", "other machine", "unknown", "same CPU", "other CPU", "CPU to GPU", "GPU to CPU"],
)
def test_the_way_follows_from_the_places(placement, ranks, expected):
    assert route(placement, ranks) == expected


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_a_named_transport_is_used(transport):
    assert route(Placement(host="a", devices=("GPU-1",)), RANKS, transport) == (transport, (0,))


def test_ipc_to_another_machine_is_refused():
    with pytest.raises(WeightSyncError, match="--update-weight-transport ipc cannot reach the engine at http://e"):
        route(Placement(host="b", devices=("GPU-1",)), RANKS, "ipc")
