"""Decode speed of the embedded engine beside its limit and its peers.

    python benchmarks/engine.py --output FILE [--size 0.6B --size 4B] [--cases rl long mixed shared step]
                                [--peers sglang transformers] [--profile] [--device cuda] [--num-gpus 2]

Random weights of each size. Cases, all with lengths forced and log-probs returned:

    rl      32 prompts of 256 tokens x 8 samples, 1,024 new tokens (--new-tokens)
    long    the same with 4,096 new tokens
    mixed   256 prompts, lengths of prompt and response uniform in [100, 1024]
    shared  16 prompts of 2,048 tokens x 8 samples, 512 new tokens, and the same with 128 distinct prompts
    step    decode steps at 64 and 256 rows, context 1k, 2k, 4k (distinct prompts)

The limit of a step is max(weight bytes / copy rate, FLOPs / product rate) + KV bytes / copy rate. Both rates are measured at
the start, and a prompt that siblings share counts once. `--profile` also prints where the kernel time of 20 steps goes, and how
long a step had no kernel. With `--device cpu` (sizes 1M, 30M, 135M) decoding is compared with transformers' generate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peers import sglang_rate, transformers_rate
from torch import Tensor
from transformers import Qwen3Config

from qwench.config.sections.engine import EngineConfig
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.protocol import GenerateRequest, MemoryTag, SamplingParams
from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of

# hidden, ffn, layers, heads, kv heads, head dim, tied, vocabulary
SIZES = {
    "1M": (128, 384, 4, 4, 2, 32, True, 1024),
    "30M": (384, 1152, 12, 6, 3, 64, True, 16384),
    "135M": (576, 1536, 30, 9, 3, 64, True, 49152),
    "0.6B": (1024, 3072, 28, 16, 8, 128, True, 151936),
    "1.7B": (2048, 6144, 28, 16, 8, 128, True, 151936),
    "4B": (2560, 9728, 36, 32, 8, 128, True, 151936),
    "8B": (4096, 12288, 36, 32, 8, 128, False, 151936),
    "14B": (5120, 17408, 40, 40, 8, 128, False, 151936),
    "32B": (5120, 25600, 64, 64, 8, 128, False, 151936),
}
COMPONENTS = {
    "attention": ("_attend_items", "_merge_chunks", "flash"),
    "norms, rope, SwiGLU": ("_add_rms_norm", "_qk_norm_rope_store", "_silu_mul"),
    "sampling": ("_block_sums", "_draw"),
    "products": ("gemm", "nvjet", "cutlass", "splitK", "_split_product", "cublas"),
}
PROFILED_STEPS = 20
TIMED_STEPS = 64
_loop = asyncio.Runner()
"""One event loop for all engines' runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Measured rates of a device."""

    copy: float
    """bytes a second, read and written"""
    product: float
    """bfloat16 FLOP a second"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Requests: `groups` prompts of given length, `samples` responses each, of given lengths."""

    prompts: Sequence[int]
    responses: Sequence[int]
    """For each prompt: new tokens of each of its samples."""
    samples: int

    @property
    def num_new(self) -> int:
        return self.samples * sum(self.responses)


def config_of(size: str) -> Qwen3Config:
    """Return the config of a size."""
    hidden, ffn, layers, heads, kv_heads, head_dim, tied, vocabulary = SIZES[size]
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=None,
        bos_token_id=None,
    )


def measure_ceilings() -> Ceilings:
    """Time a large copy and a large product."""

    def fastest(work: Callable[[], object]) -> float:
        events = []
        for _ in range(15):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return sorted(float(start.elapsed_time(end)) for start, end in events[5:])[5] / 1e3

    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return Ceilings(copy=copy, product=2 * 8192**3 / fastest(lambda: left @ right))


def random_weights(architecture: Architecture, device: str, dtype: torch.dtype) -> Iterator[list[tuple[str, Tensor]]]:
    """Make normal weights of deviation 0.02 and norms of 1, one by one: all of them may not fit beside the engine's."""
    torch.manual_seed(0)
    for name, shape in architecture.parameter_shapes().items():
        weight = torch.ones(shape, device=device, dtype=dtype)
        yield [(name, weight if "norm" in name else weight.normal_(0, 0.02))]


def loads(new_tokens: int) -> dict[str, Load]:
    """Return the cases that are whole runs."""
    uniform = random.Random(0)
    lengths = [uniform.randint(100, 1024) for _ in range(512)]
    return {
        "rl": Load(prompts=[256] * 32, responses=[new_tokens] * 32, samples=8),
        "long": Load(prompts=[256] * 32, responses=[4096] * 32, samples=8),
        "mixed": Load(prompts=lengths[:256], responses=lengths[256:], samples=1),
        "shared": Load(prompts=[2048] * 16, responses=[512] * 16, samples=8),
        "shared, distinct": Load(prompts=[2048] * 128, responses=[512] * 128, samples=1),
    }


def prompts_of(load: Load, vocab_size: int) -> list[list[int]]:
    """Return the prompts of a load."""
    source = random.Random(0)
    return [[source.randrange(vocab_size) for _ in range(length)] for length in load.prompts]


def step_limit(architecture: Architecture, ceilings: Ceilings, rows: int, kv_tokens: float) -> float:
    """Return the least seconds of a decode step that reads `kv_tokens` cached tokens."""
    shapes = architecture.parameter_shapes()
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    read = sum(sizes.values()) - (0 if architecture.tied_head else sizes["model.embed_tokens.weight"])
    kv_bytes = 4 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim
    return max(2 * read / ceilings.copy, 2 * rows * read / ceilings.product) + kv_tokens * kv_bytes / ceilings.copy


def load_limit(architecture: Architecture, ceilings: Ceilings, load: Load) -> float:
    """Return the least seconds of a load: its decode steps, and one prefill of each prompt."""
    total = 0.0
    for position in range(max(load.responses)):
        live = [length for length, new in zip(load.prompts, load.responses, strict=True) if new > position]
        kv_tokens = sum(live) + load.samples * len(live) * position
        total += step_limit(architecture, ceilings, load.samples * len(live), kv_tokens)
    inner = sum(torch.Size(shape).numel() for name, shape in architecture.parameter_shapes().items() if "layers" in name)
    return total + 2 * inner * sum(load.prompts) / ceilings.product


class Measured:
    """An engine with random weights, and what it did."""

    def __init__(self, size: str, device: str, settings: EmbeddedSettings) -> None:
        config = config_of(size)
        self.architecture = architecture_of(config)
        self.part = self.architecture.divided(settings.num_devices)
        """Of one GPU: its limits are the engine's, if collectives cost nothing."""
        self.engine = EmbeddedEngine.from_checkpoint(config, settings)
        weights = random_weights(self.architecture, device, settings.resolved_dtype)
        _loop.run(self.engine.update_weights(weights, version=1))

    async def run(self, load: Load, profile: dict[str, float] | None = None, *, flush: bool = True) -> tuple[float, int]:
        """Generate a load, by default with nothing cached; return seconds and decode steps."""
        prompts = prompts_of(load, self.architecture.vocab_size)
        sampling = [SamplingParams(max_new_tokens=new, ignore_eos=True, seed=index) for index, new in enumerate(load.responses)]
        requests = [
            GenerateRequest(request_id=f"{index}-{sample}", input_ids=prompt, sampling=sampling[index])
            for index, prompt in enumerate(prompts)
            for sample in range(load.samples)
        ]
        if flush:
            await self.engine.flush_cache()
        before = await self.engine.stats()
        _synchronize()
        start = time.perf_counter()
        running = asyncio.gather(*(self.engine.generate(request) for request in requests))
        if profile is not None:
            await profile_steps(self.engine, before.decode_steps + max(load.responses) // 2, profile)
        results = await running
        seconds = time.perf_counter() - start
        assert sum(len(result.log_probs) for result in results) == load.num_new
        stats = await self.engine.stats()
        assert stats.num_preempted == before.num_preempted, "requests were computed twice"
        return seconds, stats.decode_steps - before.decode_steps


async def profile_steps(engine: EmbeddedEngine, first_step: int, budget: dict[str, float]) -> None:
    """Fill `budget` with milliseconds a step by component, over PROFILED_STEPS steps."""
    while (await engine.stats()).decode_steps < first_step:
        await asyncio.sleep(0.001)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        await engine.pause()
        begin = (await engine.stats()).decode_steps
        await engine.resume()
        while (await engine.stats()).decode_steps < begin + PROFILED_STEPS:
            await asyncio.sleep(0.0005)
        await engine.pause()
        steps = (await engine.stats()).decode_steps - begin
    await engine.resume()
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    for start, end, name in kernels:
        budget[_component(name, end - start)] += (end - start) / 1e3 / steps
    budget["kernels a step"] = len(kernels) / steps
    busy, until = 0.0, kernels[0][0]
    for start, end, _ in kernels:  # they may overlap
        busy, until = busy + max(end - max(start, until), 0.0), max(until, end)
    budget["without a kernel"] = (until - kernels[0][0] - busy) / 1e3 / steps
    budget["step"] = (until - kernels[0][0]) / 1e3 / steps


def _component(name: str, _duration: float) -> str:
    return next((part for part, words in COMPONENTS.items() if any(word in name for word in words)), f"other: {name[:60]}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_load(measured: Measured, ceilings: Ceilings, load: Load, *, rounds: int, profile: bool) -> dict[str, object]:
    """Run a load some times after one more, and compare it with its limit."""
    runs = [_loop.run(measured.run(load)) for _ in range(rounds + 1)]
    first = runs[0][0]  # captures graphs
    runs = sorted(runs[1:] or runs)
    seconds = runs[len(runs) // 2][0]
    limit = load_limit(measured.part, ceilings, load)
    row: dict[str, object] = {
        "tok/s": round(load.num_new / seconds),
        "spread": [round(load.num_new / run[0]) for run in runs],
        "limit tok/s": round(load.num_new / limit),
        "of limit": round(limit / seconds, 3),
        "decode steps": runs[0][1],
        "seconds": round(seconds, 2),
        "seconds of the first run": round(first, 2),
    }
    if profile and load.samples > 1:
        _loop.run(measured.engine.sleep([MemoryTag.KV_CACHE]))
        _loop.run(measured.engine.wake([MemoryTag.KV_CACHE]))
        row["seconds after a sleep"] = round(_loop.run(measured.run(load))[0], 2)
    if profile:
        budget: dict[str, float] = defaultdict(float)
        _loop.run(measured.run(load, budget))
        row["ms a step"] = {name: round(value, 3) for name, value in sorted(budget.items()) if value >= 0.005}
    return row


def measure_steps(measured: Measured, ceilings: Ceilings) -> dict[str, object]:
    """Time decode steps of a given number of rows and context."""
    table: dict[str, object] = {}
    assert measured.engine.max_request_tokens > 0  # takes the memory of the cache
    num_tokens = _loop.run(measured.engine.stats()).num_pages * 16
    for rows in (64, 256):
        for context in (1024, 2048, 4096):
            load = Load(prompts=[context - TIMED_STEPS] * rows, responses=[2 * TIMED_STEPS] * rows, samples=1)
            if num_tokens < rows * (context + 2 * TIMED_STEPS):
                continue
            timed = sorted(_loop.run(time_steps(measured, load)) for _ in range(3))[1]
            limit = step_limit(measured.part, ceilings, rows, timed[1])
            table[f"{rows} rows, context {context}"] = {
                "ms": round(timed[0] * 1e3, 3), "limit ms": round(limit * 1e3, 3), "of limit": round(limit / timed[0], 3),
            }  # fmt: skip
    return table


async def time_steps(measured: Measured, load: Load) -> tuple[float, float]:
    """Return seconds of a decode step, and the cached tokens that one reads, over TIMED_STEPS steps of all rows."""
    engine, rows = measured.engine, len(load.prompts)
    # The prompts stay cached, so that all rows begin to decode in one step: rows that wait for others would end before them.
    await measured.run(replace(load, responses=[1] * rows))
    before = await engine.stats()
    running = asyncio.ensure_future(measured.run(load, flush=False))
    while (await engine.stats()).generated_tokens < before.generated_tokens + rows:
        await asyncio.sleep(0.0005)
    for steps in (8, TIMED_STEPS):  # the first ones capture a graph
        begin, start = await engine.stats(), time.perf_counter()
        while (now := await engine.stats()).decode_steps < begin.decode_steps + steps:
            assert not running.done(), "the responses are longer than what is timed"
            await asyncio.sleep(0.0005)
        seconds = (time.perf_counter() - start) / (now.decode_steps - begin.decode_steps)
    generated = (begin.generated_tokens + now.generated_tokens) / 2 - before.generated_tokens
    await running
    return seconds, sum(load.prompts) + generated


def measure_cpu(size: str, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Decode 32 prompts of 16 tokens for 64 new ones, beside transformers' generate; medians of alternating rounds."""
    load = Load(prompts=[16] * 32, responses=[64] * 32, samples=1)
    measured = Measured(size, "cpu", EmbeddedSettings(dtype=dtype, sizes=EngineConfig(embedded_kv_cache_tokens=4096)))
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):
        rates["qwench"].append(load.num_new / _loop.run(measured.run(load))[0])
        rates["transformers"].append(transformers_rate(config_of(size), "cpu", dtype, prompts_of(load, 1000), 64))
    medians = {name: sorted(values[1:])[rounds // 2] for name, values in rates.items()}
    return {name: round(value) for name, value in medians.items()} | {
        "ratio": round(medians["qwench"] / medians["transformers"], 2)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--size", action="append", choices=SIZES, help="model to measure; may be repeated")
    parser.add_argument("--cases", nargs="+", default=["rl"], help="loads to measure; see above")
    parser.add_argument("--peers", nargs="*", default=[], choices=["sglang", "transformers"], help="others for the load rl")
    parser.add_argument("--sglang-python", default=sys.executable, help="the interpreter that has SGLang")
    parser.add_argument("--new-tokens", type=int, default=1024, help="length of a response of the load rl")
    parser.add_argument("--generate-tokens", type=int, default=1024, help="new tokens of transformers' generate")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each load")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="None: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--mem-fraction", type=float, default=0.85, help="share of the GPU's memory for weights and KV cache")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs that the engine divides the model over")
    parser.add_argument("--profile", action="store_true", help="also print where kernel time goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the engine")
    args = parser.parse_args()
    report: dict[str, object] = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}

    def note(name: str, value: object) -> None:
        report[name] = value
        print(name, json.dumps(value), flush=True)
        args.output.write_text(json.dumps(report, indent=1))

    if args.device == "cpu":
        for size in args.size or ["1M", "30M", "135M"]:
            for dtype in [args.dtype] if args.dtype else ["float32", "bfloat16"]:
                note(f"{size} {dtype}", measure_cpu(size, getattr(torch, dtype), args.rounds))
        return
    ceilings = measure_ceilings()
    note("device", torch.cuda.get_device_name() + f", ceilings {asdict(ceilings)}")
    for size in args.size or ["0.6B"]:
        if "sglang" in args.peers:
            note(f"{size} sglang", sglang_rate(config_of(size), args.new_tokens, python=args.sglang_python, rounds=args.rounds))
        measured = Measured(
            size,
            args.device,
            EmbeddedSettings(
                device="cuda",
                num_devices=args.num_gpus,
                sizes=EngineConfig(embedded_mem_fraction=args.mem_fraction, embedded_max_running_requests=256),
            ),
        )
        for name, load in loads(args.new_tokens).items():
            if name.split(",")[0] in args.cases:
                note(f"{size} {name}", measure_load(measured, ceilings, load, rounds=args.rounds, profile=args.profile))
        if "step" in args.cases:
            note(f"{size} step", measure_steps(measured, ceilings))
        _loop.run(measured.engine.close())
        del measured
        torch.cuda.empty_cache()
        if "transformers" in args.peers:
            load = loads(args.new_tokens)["rl"]
            prompts = [prompt for prompt in prompts_of(load, 151936) for _ in range(8)]
            rate = transformers_rate(config_of(size), "cuda", torch.bfloat16, prompts, args.generate_tokens)
            note(f"{size} transformers", round(rate))


if __name__ == "__main__":
    main()
