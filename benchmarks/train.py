"""Speed of a training step beside the device's limit and a Hugging Face loop.

    python benchmarks/train.py --output FILE [--size 0.6B --size 4B] [--tokens 16384] [--micro-batches 6] [--profile]
                               [--cases qwench recompute huggingface] [--attention varlen] [--offload] [--device cuda:0]

Random weights of each size; sequences of lognormal lengths (mean 1,024, at most 4,096), four fifths of each trained; the loss
is a policy gradient with an entropy term; AdamW with float32 masters. Every case trains the same tokens:

    qwench       packed micro-batches of at most --tokens tokens
    recompute    the same, every layer computed again in the backward
    huggingface  the transformers module (SDPA), eight sequences padded to the longest, AdamW of torch in float32 masters

MFU = 3 * forward FLOPs * tokens/s / 989.5e12, HFU counts recomputed layers besides; forward FLOPs are 2 for each weight of a
product, and 2 * layers * heads * head_dim for each pair of causal attention; logits count where a token is trained. With
--lora-rank the factor is 2: frozen weights have no gradient, and adapters are not counted.
`--profile` adds where the kernel time of one step goes, and how long the step had no kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from transformers import AutoModelForCausalLM

from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.training import TrainingConfig
from qwench.data.packing import pack_by_tokens
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.memory import FORWARD_AND_BACKWARD, FORWARD_AND_FROZEN_BACKWARD, SequenceCost
from qwench.models.random_qwen3 import find_size, random_weights
from qwench.training.batch import pack
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.process_group import init_process_group

PEAK_FLOPS = 989.5e12
COMPONENTS = {
    "head": ("_statistics", "_gradient", "_head_product", "_finish"),
    "attention": ("flash", "fmha", "sdpa", "cudnn"),
    "linear": ("nvjet", "gemm", "cutlass", "xmma", "cublas", "splitK"),
    "norms, rope, SwiGLU": ("_add_rms_norm", "_rms_norm_backward", "_qk_norm_rope", "_silu_mul"),
    "optimizer": ("adam", "Adam"),
    "copies": ("Memcpy", "Memset", "copy"),
}
Step = Callable[[], tuple[float, float]]
"""() -> (loss, gradient norm) of one step over all tokens."""


def draw_lengths(count: int, *, mean: int, longest: int) -> list[int]:
    """Return lognormal lengths, sigma 0.6."""
    draw = random.Random(0)
    return [min(longest, max(16, round(mean * math.exp(draw.gauss(-0.18, 0.6))))) for _ in range(count)]


def make_batch(lengths: Sequence[int], vocab_size: int) -> RolloutBatch:
    """Return random tokens, the last four fifths of each sequence trained."""
    draw = torch.Generator().manual_seed(0)
    return RolloutBatch(
        tokens=[torch.randint(vocab_size, (length,), generator=draw) for length in lengths],
        loss_mask=[torch.ones(length - length // 5, dtype=torch.bool) for length in lengths],
        rewards=torch.zeros(len(lengths)),
        graded=torch.ones(len(lengths), dtype=torch.bool),
        group_ids=torch.zeros(len(lengths), dtype=torch.int64),
        execution_ids=torch.arange(len(lengths)),
    )


def make_model(folder: Path, size: str, device: torch.device) -> None:
    """Write a checkpoint with random weights."""
    shape = find_size(size)
    config = shape.to_config(vocab_size=shape.vocab_size or 151936)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    weights = random_weights(config, seed=0, dtype=torch.bfloat16, device=device)
    save_file({name: tensor.cpu() for name, tensor in weights}, folder / "model.safetensors", metadata={"format": "pt"})


def ceilings(device: torch.device) -> dict[str, object]:
    """Return the measured copy rate in TB/s and bf16 product rate in TFLOP/s."""
    if device.type != "cuda":
        return {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    source = torch.randn(1 << 30, device=device)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b)
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "copy_tb_per_s": 2 * source.nbytes / copy / 1e9,
        "product_tflops": 2 * 8192**3 / product / 1e9,
    }


def median_ms(work: Callable[[], object]) -> float:
    """Return the median time on the GPU of 10 calls after 3."""
    for _ in range(3):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(float(a.elapsed_time(b)) for a, b in pairwise(marks))


def qwench_step(folder: Path, batch: RolloutBatch, given: argparse.Namespace, *, recompute: bool) -> tuple[Step, list[int]]:
    """Return the step of our trainer, and the tokens of its micro-batches."""
    cuda = given.device.type == "cuda"
    trainer = FsdpTrainer.build(
        folder,
        training=TrainingConfig(gradient_checkpointing=recompute),
        optimizer=OptimizerConfig(
            lr=1e-6,
            lr_decay_style="constant",
            weight_decay=0.1,
            adam_beta2=0.98,
            optimizer_cpu_offload=given.offload,
            overlap_cpu_optimizer_d2h_h2d=given.offload,
            use_precision_aware_optimizer=given.bf16_moments,
            exp_avg_dtype="bf16" if given.bf16_moments else "fp32",
            exp_avg_sq_dtype="bf16" if given.bf16_moments else "fp32",
        ),
        total_steps=1000,
        param_dtype=torch.bfloat16 if cuda else torch.float32,
        device=given.device,
        attention=given.attention if cuda else "sdpa",
        lora=_adapters(given),
    )
    micro_batches = [pack(batch, members) for members in pack_by_tokens(batch.lengths, max_tokens=given.tokens)]
    num_trained = sum(int(mask.sum()) for mask in batch.loss_mask)

    def loss(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
        assert entropy is not None
        return TokenLoss(loss=policy_gradient(log_probs, entropy, micro_batch.loss_mask.float() / num_trained), metrics={})

    def step() -> tuple[float, float]:
        sums = trainer.forward_backward(micro_batches, loss, temperature=1.0, with_entropy=True, after_each=lambda: None)
        result = trainer.optim_step(sums)
        return result.loss, result.grad_norm

    return step, [micro_batch.num_tokens for micro_batch in micro_batches]


def _adapters(given: argparse.Namespace) -> LoraConfig | None:
    if not given.lora_rank:
        return None
    return LoraConfig(lora_rank=given.lora_rank, lora_alpha=given.lora_rank, lora_base=given.lora_base)


def policy_gradient(log_probs: Tensor, entropy: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of one advantage for all tokens."""
    return -(((log_probs - log_probs.detach()).exp() + 0.001 * entropy) * weights).sum()


def huggingface_step(folder: Path, batch: RolloutBatch, given: argparse.Namespace) -> tuple[Step, list[int]]:
    """Return the step of a loop as trainers of padded batches write it, and its micro-batches' tokens, padding included."""
    device = given.device
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device)
    model.gradient_checkpointing_enable() if given.huggingface_checkpointing else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    num_trained = sum(int(mask.sum()) for mask in batch.loss_mask)
    count, size = len(batch.tokens), given.huggingface_sequences
    bins = [range(i, min(i + size, count)) for i in range(0, count, size)]

    def step() -> tuple[float, float]:
        total = 0.0
        for members in bins:
            tokens = torch.nn.utils.rnn.pad_sequence([batch.tokens[i] for i in members], batch_first=True).to(device)
            mask = torch.zeros(tokens.shape, dtype=torch.bool)
            for row, i in enumerate(members):
                mask[row, len(batch.tokens[i]) - len(batch.loss_mask[i]) - 1 : len(batch.tokens[i]) - 1] = True
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(tokens, use_cache=False).logits[:, :-1]
            everything = logits.float().log_softmax(-1)
            log_probs = everything.gather(-1, tokens[:, 1:, None]).squeeze(-1)
            entropy = -(everything.exp() * everything).sum(-1)
            loss = policy_gradient(log_probs, entropy, mask[:, :-1].to(device).float() / num_trained)
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total, float(norm)

    return step, [len(members) * max(len(batch.tokens[i]) for i in members) for members in bins]


def measure(name: str, step: Step, work: dict[str, float], given: argparse.Namespace) -> dict[str, object]:
    """Return the medians of a case, after a first step that warms up."""
    cuda = given.device.type == "cuda"
    seconds: list[float] = []
    for index in range(given.steps + 1):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss, norm = step()
        if cuda:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        if index:
            seconds.append(took)
        else:
            first, first_loss, first_norm = took, loss, norm
    median = statistics.median(seconds)
    counted = work["recomputed"] if name == "recompute" else work["flops"]
    return {
        "case": name,
        "seconds": median,
        "spread": max(seconds) - min(seconds),
        "first_seconds": first,
        "tokens_per_s": work["tokens"] / median,
        "mfu": work["flops"] / median / PEAK_FLOPS,
        "hfu": counted / median / PEAK_FLOPS,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"] if cuda else None,
        "loss": first_loss,
        "grad_norm": first_norm,
        "profile": profile(step) if given.profile and cuda else None,
    }


def profile(step: Step) -> dict[str, object]:
    """Return milliseconds of one step: by component, in the largest kernels, and without any kernel."""
    with torch_profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    events = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    idle, end = 0.0, spans[0][1]
    for begin, stop in spans:
        idle += max(0.0, begin - end)
        end = max(end, stop)
    components: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in events:
        milliseconds = event.time_range.elapsed_us() / 1e3
        found = (label for label, words in COMPONENTS.items() if any(word in event.name for word in words))
        components[next(found, "other")] += milliseconds
        kernels[event.name[:80]] += milliseconds
    return {
        "span_ms": (end - spans[0][0]) / 1e3,
        "idle_ms": idle / 1e3,
        "components_ms": dict(components.most_common()),
        "kernels_ms": dict(kernels.most_common(25)),
    }


@contextmanager
def checkpoint(size: str, device: torch.device) -> Iterator[Path]:
    """Make a model in memory, and forget it at the end."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        make_model(Path(folder), size, device)
        yield Path(folder)


def measure_size(size: str, given: argparse.Namespace) -> list[dict[str, object]]:
    """Return the results of every case of one size."""
    results = []
    with checkpoint(size, given.device) as folder:
        config = load_hf_config(folder)
        lengths = draw_lengths(given.tokens * given.micro_batches // given.mean, mean=given.mean, longest=4 * given.mean)
        batch = make_batch(lengths, config.vocab_size)
        cost = SequenceCost.of_model(architecture_of(config))
        untrained = sum(lengths) - sum(len(mask) for mask in batch.loss_mask)
        forward = sum(cost.of(length) for length in lengths) - cost.head * untrained
        layers = forward - cost.head * (sum(lengths) - untrained)
        passes = FORWARD_AND_FROZEN_BACKWARD if given.lora_rank else FORWARD_AND_BACKWARD
        work = {"tokens": sum(lengths), "flops": passes * forward, "recomputed": passes * forward + layers}
        for case in given.cases:
            if case == "huggingface":
                step, tokens = huggingface_step(folder, batch, given)
            else:
                step, tokens = qwench_step(folder, batch, given, recompute=case == "recompute")
            adapters = {"lora rank": given.lora_rank, "lora base": given.lora_base}
            result = {"size": size, **adapters, "micro_batches": tokens, **measure(case, step, work, given)}
            print(json.dumps(result), flush=True)
            results.append(result)
            del step
            if given.device.type == "cuda":
                torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--size", action="append", help="name of a size (qwench.models.random_qwen3); may be repeated")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["qwench", "recompute"],
        choices=["qwench", "recompute", "huggingface"],
        help="loops to measure; see above",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="most tokens of a micro-batch")
    parser.add_argument("--mean", type=int, default=1024, help="mean length of sequences, in tokens")
    parser.add_argument("--micro-batches", type=int, default=6, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each case")
    parser.add_argument("--attention", default="varlen", help="--attn-implementation of the trainer")
    parser.add_argument("--offload", action="store_true", help="masters and moments on the host")
    parser.add_argument("--bf16-moments", action="store_true", help="hold Adam's moments in bfloat16")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank at all projections")
    parser.add_argument("--lora-base", default="auto", choices=["auto", "fp8", "nf4"], help="form of the frozen projections")
    parser.add_argument(
        "--huggingface-sequences", type=int, default=8, help="sequences of a micro-batch of the case huggingface"
    )
    parser.add_argument(
        "--huggingface-checkpointing", action="store_true", help="compute layers again in the backward of the case huggingface"
    )
    parser.add_argument("--profile", action="store_true", help="also print where kernel time goes")
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),
        help="device of the trainer",
    )
    given = parser.parse_args()
    measured = ceilings(given.device)
    print(json.dumps(measured), flush=True)
    init_process_group(given.device, environ={}, timeout_s=600)
    results = [result for size in given.size or ["0.6B"] for result in measure_size(size, given)]
    given.output.write_text(json.dumps({"ceilings": measured, "results": results}, indent=1))


if __name__ == "__main__":
    main()
