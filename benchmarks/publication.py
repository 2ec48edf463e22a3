"""Time how weights reach an engine: aliased, copied, quantized, by CUDA IPC, from disk, and by broadcast to another GPU.

    python benchmarks/publication.py --output FOLDER [--size 0.6B --size 4B] [--rounds 5] [--bucket-bytes 536870912]

Random weights of each size are written as a checkpoint under FOLDER (kept, and used again). An engine server is started from it
as a second process (on a CPU it shares memory instead of a GPU) and, where there is another GPU, one there, which NCCL reaches.
Every way is timed `--rounds` times after one more to warm up. A publication includes the checksums at both ends; their own time
is the line "checksums". GB are those of the trainer's weights. Prints each row of a Markdown table of medians as soon as it is
measured, and adds it to publication.jsonl. `--ways copied ipc` measures these only; disk is timed once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qwench.config.sections.engine import EngineConfig
from qwench.engines.embedded.compute.weights import read_folder
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.fleet.servers import ServerProcess, server_environ
from qwench.engines.kinds.embedded import embedded_command
from qwench.engines.kinds.kind import ServerOrder
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.random_qwen3 import make_checkpoint
from qwench.weights.broadcast import BroadcastLink
from qwench.weights.local import QuantizedWeights, send_alias, send_copies
from qwench.weights.plan import PublicationPlan
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress
from qwench.wire.checksum import tensor_checksums
from qwench.wire.portions import WeightBucket, WeightPart, bucketed

TOKEN = "benchmark"
KV_TOKENS = 4096
WAYS = ("checksums", "aliased", "copied", "fp8", "broadcast", "ipc", "disk")


class Weights:
    """A trainer that holds a checkpoint's weights on the device."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        buckets = read_folder(folder, architecture_of(load_hf_config(folder)))
        self.tensors = {name: tensor.to(device=device, dtype=dtype) for bucket in buckets for name, tensor in bucket}

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def weights(self, *, bucket_bytes: int, part: WeightPart = "merged") -> Iterator[WeightBucket]:
        return bucketed(self.tensors.items(), bucket_bytes=bucket_bytes)

    def shared_weights(self, part: WeightPart = "merged") -> dict[str, Tensor]:
        return self.tensors


def timed(work: Callable[[], None], *, rounds: int, device: torch.device) -> list[float]:
    """Return seconds of each round but the first."""
    seconds = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure(size: str, args: argparse.Namespace) -> Iterator[tuple[str, int, list[float]]]:
    """Yield each way, the bytes it moved, and the seconds that each round took; the quick ways first."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = args.output / f"model-{size}"
    if not folder.exists():
        make_checkpoint(folder, size=size, tokenizer=build_small_tokenizer(), seed=0, device=args.device)
    source = Weights(folder, device, dtype)
    if "checksums" in args.ways:
        yield "checksums", source.num_bytes, timed(lambda: check(source), rounds=args.rounds, device=device)
    for way, seconds in in_process(source, folder, args, dtype):
        yield way, source.num_bytes, seconds
    for way, seconds in to_a_server(source, folder, args, gpu=1, ways=("broadcast",)):
        yield way, source.num_bytes, seconds
    for way, seconds in to_a_server(source, folder, args, gpu=0, ways=("ipc", "disk")):
        yield way, source.num_bytes, seconds


def check(source: Weights) -> None:
    tensor_checksums(source.tensors.items())


def in_process(
    source: Weights, folder: Path, args: argparse.Namespace, dtype: torch.dtype
) -> Iterator[tuple[str, list[float]]]:
    senders = {
        "aliased": partial(send_alias, source.tensors),
        "copied": partial(send_copies, source, bucket_bytes=args.bucket_bytes, part="merged"),
        "fp8": partial(send_copies, QuantizedWeights(source), bucket_bytes=args.bucket_bytes, part="merged"),
    }
    for way, send in senders.items():
        if way not in args.ways:
            continue
        settings = EmbeddedSettings(
            sizes=EngineConfig(embedded_kv_cache_tokens=KV_TOKENS), device=args.device, dtype=dtype, fp8=way == "fp8"
        )
        engine = EmbeddedEngine.from_checkpoint(load_hf_config(folder), settings)
        publish = partial(send, engines=[engine], version=1)
        yield way, timed(partial(_await, publish), rounds=args.rounds, device=source.device)
        asyncio.run(engine.close())


def _await(publish: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(publish())


def to_a_server(
    source: Weights, folder: Path, args: argparse.Namespace, *, gpu: int, ways: Sequence[Literal["broadcast", "ipc", "disk"]]
) -> Iterator[tuple[str, list[float]]]:
    wanted = [way for way in ways if way in args.ways]
    if not wanted or gpu >= max(torch.cuda.device_count(), 1):
        return
    order = ServerOrder(
        engine=EngineConfig(embedded_kv_cache_tokens=KV_TOKENS, engine_start_timeout=600.0),
        model_folder=folder.absolute(),
        dtype=str(next(iter(source.tensors.values())).dtype).removeprefix("torch."),
        engine_sizes=(1,) * (gpu + 1),
        releases_memory=False,
        seed=0,
        serves_checkpoint=False,
        deterministic=False,
        log_folder=args.output,
        token=TOKEN,
    )
    server = ServerProcess(
        embedded_command(
            order,
            index=gpu,
            gpu_ids=(gpu,) if args.device.startswith("cuda") else (),
            environ=server_environ(os.environ),
        )
    )
    link = BroadcastLink()
    try:
        address = EngineAddress(base_url=server.start(), token=TOKEN, kind="embedded", placement=None)
        for way in wanted:
            flags = EngineConfig(
                update_weight_buffer_size=args.bucket_bytes,
                update_weight_transport=way,
                update_weight_disk_dir=str(args.output),
            )
            plan = PublicationPlan(engine=flags, model_folder=folder, timeout_s=600)
            publish = partial(publish_from_rank, source, [address], 1, plan, link=link)
            # A disk is slow enough to be timed once.
            yield way, timed(publish, rounds=1 if way == "disk" else args.rounds, device=source.device)
    finally:
        link.close()
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints and publication.jsonl")
    parser.add_argument("--size", action="append", help="name of a size (qwench.models.random_qwen3); may be repeated")
    parser.add_argument("--rounds", type=int, default=5, help="timed publications of each way")
    parser.add_argument("--bucket-bytes", type=int, default=512 * 1024**2, help="size of a bucket of weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the trainer")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="ways to measure")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    print("| size | way | GB | ms | GB/s |\n| --- | --- | --- | --- | --- |", flush=True)
    with (args.output / "publication.jsonl").open("a", encoding="utf-8") as log:
        for size in args.size or (["0.6B", "4B", "8B"] if args.device.startswith("cuda") else ["tiny"]):
            for way, num_bytes, seconds in measure(size, args):
                median = statistics.median(seconds)
                print(
                    f"| {size} | {way} | {num_bytes / 1e9:.2f} | {median * 1e3:.2f} | {num_bytes / 1e9 / median:.1f} |",
                    flush=True,
                )
                print(json.dumps({"size": size, "way": way, "bytes": num_bytes, "seconds": seconds}), file=log, flush=True)


if __name__ == "__main__":
    main()
