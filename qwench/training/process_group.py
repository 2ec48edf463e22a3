"""The process group of a run's ranks. A run with one rank has a group of one."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qwench.wire.weight_group import make_group


def init_process_group(
    device: torch.device, *, environ: Mapping[str, str], timeout_s: float, members: range | None = None
) -> None:
    """Join the ranks that `environ` describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or form a group of one.

    Collectives on host tensors use gloo, on GPU tensors NCCL. A collective that waits longer than `timeout_s` raises.
    A group of one opens no port. A second call finds the group and does nothing. At the end of a run that went well each rank
    calls `leave_process_group`: a process that ends while gloo's threads run may abort.

    Args:
        members: the ranks of `environ` that form the group, numbered from 0 in it. None: all.
    """
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "RANK" not in environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    rank, world_size, store = _reach_store(environ, timeout)
    if members is not None:
        rank, world_size, store = rank - members.start, len(members), dist.PrefixStore(f"ranks from {members.start}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def make_link(environ: Mapping[str, str], *, timeout_s: float) -> Any:
    """Return a group of gloo of all ranks of `environ`, beside the default group; collective."""
    timeout = timedelta(seconds=timeout_s)
    rank, world_size, store = _reach_store(environ, timeout)
    return make_group("gloo", dist.PrefixStore("link", store), rank, world_size, timeout)


def _reach_store(environ: Mapping[str, str], timeout: timedelta) -> tuple[int, int, dist.Store]:
    """Return rank, world size, and the store through which the ranks find each other."""
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    # torchrun's own agent listens on the port already; without torchrun, rank 0 does.
    listens = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=listens, timeout=timeout, wait_for_workers=False)
    return rank, world_size, store


def barrier() -> None:
    """Wait for all ranks; without a process group do nothing."""
    if dist.is_initialized():
        dist.barrier()


def largest_of_ranks(value: float, device: torch.device) -> float:
    """Return the largest of all ranks' values; collective, on what `device` reduces with."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def agree_on_largest(value: int) -> int:
    """Return the largest of all ranks' values; collective. Without a process group return the value."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def leave_process_group() -> None:
    """Destroy the default process group; collective. Without a process group do nothing.

    Call it after the last reference to a trainer is gone. A group ends its threads with its last reference; a group that
    lives until the interpreter ends may abort the process.
    """
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()
