"""Measure what NCCL reaches between the GPUs of this machine: `python benchmarks/multi_gpu/nccl_rate.py [--gpus N]`.

Prints bus rates in GB/s: bytes x 2 (N - 1) / N a second for an all-reduce, bytes a second for a broadcast.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def measure(rank: int, given: argparse.Namespace, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=given.gpus)
    buffer = torch.zeros(given.mib << 20, dtype=torch.uint8, device="cuda")
    ways: dict[str, tuple[Callable[[], object], float]] = {
        "all-reduce": (lambda: dist.all_reduce(buffer.view(torch.bfloat16)), 2 * (given.gpus - 1) / given.gpus),
        "broadcast": (lambda: dist.broadcast(buffer, 0), 1.0),
    }
    for name, (collective, factor) in ways.items():
        seconds = []
        for _ in range(given.rounds + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            collective()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        if rank == 0:
            rate = buffer.nbytes * factor / statistics.median(seconds[3:]) / 1e9
            print(f"{name} of {given.mib} MiB over {given.gpus} GPUs: {rate:.0f} GB/s")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="GPUs to measure")
    parser.add_argument("--mib", type=int, default=1024, help="size of the buffer, in MiB")
    parser.add_argument("--rounds", type=int, default=20, help="timed collectives")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, args=(given, f"{folder}/store"), nprocs=given.gpus)


if __name__ == "__main__":
    main()
