"""Ranks of a test as processes of this machine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forked import Forked

CPU = torch.device("cpu")


def run_ranks(call: Callable[..., object], ranks: Sequence[tuple[Any, ...]], *, folder: Path, timeout_s: float) -> None:
    """Make each call in a process of its own. One that fails is an error, with what it said; what it says is in `folder`."""
    running = [Forked(folder / f"said-{rank}", call, *arguments) for rank, arguments in enumerate(ranks)]
    try:
        ended = [process.end(timeout_s=timeout_s) for process in running]
    finally:
        for process in running:
            process.kill()
    failed = {rank: end.stderr for rank, end in enumerate(ended) if end.returncode != 0}
    assert not failed, "\n".join(f"rank {rank} of {len(ranks)} failed:\n{said}" for rank, said in failed.items())


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
