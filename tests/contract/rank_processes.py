"""Ranks of a test as processes of this machine."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


def run_to_end(ranks: Sequence[BaseProcess], *, timeout_s: float) -> list[int | None]:
    """Start the ranks, wait for each up to `timeout_s`, end what still runs, and return exit codes; None: it was ended."""
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout_s)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


@contextmanager
def joined(rank: int, world_size: int, store: Path, *, timeout_s: float, device: torch.device = CPU) -> Iterator[None]:
    """Have the ranks in one process group inside the context, over gloo and, on GPUs, NCCL.

    A group for each case of a suite, with a `store` of its own: the threads of groups that are only forgotten would pile up.
    """
    name = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(name, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    yield
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()
