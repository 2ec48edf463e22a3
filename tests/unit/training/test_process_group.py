"""Joining ranks: alone, and as a launcher's environment says."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from qwench.training import process_group
from qwench.training.fsdp.parallelize import build_mesh
from qwench.training.process_group import init_process_group
from tests.deadlines import patient
from tests.forked import Forked, ranks_environ

_CPU = torch.device("cpu")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "by-a-launcher"])
def test_a_group_of_one(launched: bool):
    address = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    init_process_group(_CPU, environ=address if launched else {}, timeout_s=patient(30))
    try:
        init_process_group(_CPU, environ={}, timeout_s=patient(30))  # a second call finds it
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        mesh = build_mesh(_CPU, dp_replicate=1)
        assert (mesh.mesh_dim_names, mesh.size()) == (("dp_shard",), 1)
    finally:
        dist.destroy_process_group()


def test_two_ranks_of_a_launcher(tmp_path: Path):
    ranks = [Forked(tmp_path / environ["RANK"], _sum_of_two, environ=environ) for environ in ranks_environ(2)]
    for finished in [rank.end() for rank in ranks]:
        assert finished.returncode == 0, finished.stderr


def _sum_of_two() -> None:
    init_process_group(_CPU, environ=os.environ, timeout_s=patient(60))
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    assert total.item() == 3.0, total
    dist.destroy_process_group()


@pytest.mark.parametrize("agent_listens", [False, True])
def test_the_first_rank_listens_unless_torchruns_agent_does_and_waits_for_no_rank(agent_listens: bool) -> None:
    port = _free_port()
    agent = dist.TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False) if agent_listens else None
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environ |= {"TORCHELASTIC_USE_AGENT_STORE": str(agent_listens)}
    rank, world_size, store = process_group._reach_store(environ, timedelta(seconds=patient(5)))
    assert (rank, world_size) == (0, 2)
    store.set("key", "value")
    assert agent is None or agent.get("key") == b"value"


@pytest.mark.parametrize(
    ("device", "environ", "members", "expected"),
    [
        ("cuda:1", {}, None, ("cpu:gloo,cuda:nccl", "HashStore", 0, 1)),
        ("cpu", {}, None, ("gloo", "HashStore", 0, 1)),
        ("cpu", {"RANK": "3"}, None, ("gloo", "store", 3, 5)),
        ("cpu", {"RANK": "3"}, range(2, 4), ("gloo", "PrefixStore ranks from 2 of store", 1, 2)),
    ],
)
def test_a_group_has_the_ranks_and_the_library_of_its_devices(monkeypatch, device, environ, members, expected) -> None:
    made, devices = list[object](), list[object]()

    def init(backend, *, store, rank, world_size, timeout) -> None:
        made.append((backend, store if isinstance(store, str) else type(store).__name__, rank, world_size))
        assert timeout == timedelta(seconds=9)

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: f"PrefixStore {prefix} of {store}")
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(process_group, "_reach_store", lambda given, timeout: (int(given["RANK"]), 5, "store"))
    init_process_group(torch.device(device), environ=environ, timeout_s=9, members=members)
    assert made == [expected] and devices == ([torch.device(device)] if device != "cpu" else [])
    monkeypatch.setattr(process_group, "make_group", lambda *given: given)
    link = process_group.make_link({"RANK": "3"}, timeout_s=9)
    assert link == ("gloo", "PrefixStore link of store", 3, 5, timedelta(seconds=9))


def test_without_a_group_a_rank_is_the_largest_and_waits_for_none() -> None:
    assert not dist.is_initialized() and process_group.agree_on_largest(7) == 7
    process_group.barrier()
    process_group.leave_process_group()


def test_the_largest_is_that_of_all_ranks_and_leaving_waits_for_them(monkeypatch) -> None:
    said = list[object]()

    def reduce(values: torch.Tensor, how: object) -> None:
        said.append((values.dtype, values.item(), how))
        values += 2

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    monkeypatch.setattr(dist, "barrier", lambda: said.append("barrier"))
    monkeypatch.setattr(process_group.gc, "collect", lambda: said.append("collect"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: said.append("destroy"))
    assert process_group.largest_of_ranks(0.1, _CPU) == 2.1 and process_group.agree_on_largest(2**53 + 1) == 2**53 + 3
    process_group.barrier()
    process_group.leave_process_group()
    most = dist.ReduceOp.MAX
    reduced = [(torch.float64, 0.1, most), (torch.int64, 2**53 + 1, most)]
    assert said == [*reduced, "barrier", "barrier", "collect", "destroy"]
