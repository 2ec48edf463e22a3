"""Broadcasts between members of a group, each in a thread of its own; one of them is built as SGLang builds it."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from qwench.errors import WeightSyncError
from qwench.wire import weight_group
from qwench.wire.weight_group import WeightGroup, backend_for, listening_store, reach_store
from tests.deadlines import patient


def run_together(*works):
    errors = []

    def guarded(work):
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the thread that asserts shall see it
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patient(60))
        assert not thread.is_alive()
    return errors


def test_three_members_hold_what_rank_0_had():
    store, port = listening_store("127.0.0.1", timeout_s=patient(30))
    held = {rank: torch.full((1000,), rank, dtype=torch.uint8) for rank in range(3)}
    held[0] = torch.arange(1000).remainder(251).to(torch.uint8)
    sent = held[0].clone()

    def member(rank):
        own = store if rank == 0 else reach_store("127.0.0.1", port, timeout_s=patient(30))
        group = WeightGroup(own, name="g", rank=rank, size=3, backend="gloo", timeout_s=patient(30))
        group.start(held[rank])()
        group.close()

    assert run_together(*(lambda rank=rank: member(rank) for rank in range(3))) == []
    assert all(torch.equal(tensor, sent) for tensor in held.values())


def test_a_member_made_by_pytorchs_own_helper_is_understood():
    """SGLang makes its side by `rendezvous` and `_new_process_group_helper`, as OpenRLHF first did."""
    store, port = listening_store("127.0.0.1", timeout_s=patient(30))
    received = torch.zeros(16, dtype=torch.uint8)

    def ours():
        group = WeightGroup(store, name="weights", rank=0, size=2, backend="gloo", timeout_s=patient(30))
        group.start(torch.arange(16, dtype=torch.uint8))()
        group.close()

    def theirs():
        timeout = timedelta(seconds=patient(30))
        peer_store, rank, size = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 1, 2, timeout=timeout))
        group, _ = c10d._new_process_group_helper(
            size, rank, [], c10d.Backend("gloo"), c10d.PrefixStore("weights", peer_store), group_name="weights", timeout=timeout
        )
        c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
        dist.broadcast(received, src=0, group=group)
        dist.destroy_process_group(group)

    assert run_together(ours, theirs) == []
    assert received.tolist() == list(range(16))


def test_who_does_not_come_is_waited_for_no_longer_than_told():
    store, _ = listening_store("127.0.0.1", timeout_s=1)
    with pytest.raises(WeightSyncError, match=r"weight group 'g', rank 0 of 2: not all members joined within 0\.5 s"):
        WeightGroup(store, name="g", rank=0, size=2, backend="gloo", timeout_s=0.5)


def test_a_broadcast_can_be_given_up_or_ends_at_its_deadline():
    store, port = listening_store("127.0.0.1", timeout_s=patient(30))
    joined = threading.Barrier(2)

    def waiting():
        group = WeightGroup(
            reach_store("127.0.0.1", port, timeout_s=patient(30)),
            name="g",
            rank=1,
            size=2,
            backend="gloo",
            timeout_s=patient(0.4),
        )
        joined.wait(patient(30))
        with pytest.raises(WeightSyncError, match="rank 1 of 2: a broadcast"):
            group.start(torch.zeros(4, dtype=torch.uint8))()
        group.give_up()
        with pytest.raises(WeightSyncError, match=r"given up|failed"):
            group.start(torch.zeros(4, dtype=torch.uint8))()
        joined.wait(patient(30))
        group.close()

    def silent():
        group = WeightGroup(store, name="g", rank=0, size=2, backend="gloo", timeout_s=patient(30))
        joined.wait(patient(30))
        joined.wait(patient(30))
        group.close()

    assert run_together(waiting, silent) == []


def test_unknown_backends_and_unreachable_stores_are_named():
    store, port = listening_store("127.0.0.1", timeout_s=1)
    with pytest.raises(WeightSyncError, match="unknown backend 'mpi'"):
        WeightGroup(store, name="g", rank=0, size=1, backend="mpi", timeout_s=1)
    del store
    with pytest.raises(WeightSyncError, match=f"no trainer listens at 127.0.0.1:{port}"):
        reach_store("127.0.0.1", port, timeout_s=0.5)


def test_the_backend_is_that_of_the_device():
    assert [backend_for(torch.device(kind)) for kind in ("cpu", "cuda")] == ["gloo", "nccl"]


class Broken:
    """A group whose broadcast fails at once, or when it is waited for."""

    def __init__(self, *, at_once):
        self.at_once, self.sent, self.num_aborts = at_once, [], 0

    def broadcast(self, tensor, root):
        self.sent.append(root)
        if self.at_once:
            raise RuntimeError("no link")
        return self

    def is_completed(self):
        return True

    def wait(self):
        raise RuntimeError("no link")

    def abort(self):
        self.num_aborts += 1


@pytest.mark.parametrize("at_once", [True, False])
def test_a_member_leaves_its_group_once_when_a_broadcast_fails(monkeypatch, at_once):
    broken, asked = Broken(at_once=at_once), []
    monkeypatch.setattr(weight_group, "make_group", lambda *words: asked.append(words) or broken)
    group = WeightGroup(dist.HashStore(), name="g", rank=1, size=2, backend="nccl", timeout_s=patient(30))
    assert asked[0][0] == "nccl" and asked[0][2:] == (1, 2, timedelta(seconds=patient(30)))
    with pytest.raises(WeightSyncError, match=r"^weight group 'g', rank 1 of 2: a broadcast failed: no link"):
        group.start(torch.zeros(1))()
    group.close()
    assert (broken.sent, broken.num_aborts) == ([0], 1)
    with pytest.raises(WeightSyncError, match="rank 1 of 2: a broadcast was given up"):
        group.start(torch.zeros(1))()


def test_the_watchdog_of_nccl_comes_after_the_deadline_of_a_broadcast(monkeypatch):
    class Nccl:
        class Options:
            _timeout = None

        def __init__(self, *words):
            self.words = words

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    store, timeout = dist.HashStore(), timedelta(seconds=7)
    *words, options = weight_group.make_group("nccl", store, 1, 2, timeout).words
    assert words == [store, 1, 2] and options._timeout > timeout
