"""Time the head alone and packed attention alone, forward and backward, as training calls them.

    python benchmarks/training_kernels.py --head 16384x1024 --head 65536x2560 --attention 1024,2048,512 --heads 16x8

The limit of the head is three products of bfloat16 at the rate that a product of 8,192 x 8,192 reaches here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from qwench.algorithms.log_probs import token_log_probs
from qwench.training.sequence_attention import attention_of

HEAD_DIM = 128


def median_ms(work: Callable[[], object], *, repeats: int) -> float:
    """Return the median time of some calls after two."""
    times = []
    for _ in range(repeats + 2):
        _wait()
        started = time.perf_counter()
        work()
        _wait()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def time_head(positions: int, hidden_size: int, given: argparse.Namespace, device: torch.device) -> str:
    """Return one line: log-probs and entropy of all positions, and both gradients."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(positions, hidden_size, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(given.vocab_size, hidden_size, device=device, dtype=dtype) / hidden_size**0.5
    labels = torch.randint(given.vocab_size, (positions,), device=device)
    total = torch.zeros_like(weight, dtype=torch.float32)
    side = min(8192, max(positions, 256))
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rate = side**3 / median_ms(lambda: a @ b, repeats=given.repeats)

    def step(kept_bytes: int) -> None:
        log_probs, entropy = token_log_probs(
            hidden, weight, labels, temperature=1.0, chunk_tokens=given.chunk_tokens, with_entropy=True,
            weight_sum=total, kept_bytes=kept_bytes,
        )  # fmt: skip
        assert entropy is not None
        (log_probs.sum() + entropy.sum()).backward()
        hidden.grad = None

    limit = 3 * positions * hidden_size * given.vocab_size / rate
    again = median_ms(lambda: step(0), repeats=given.repeats)
    kept = median_ms(lambda: step(1 << 62), repeats=given.repeats) if given.keep_logits else float("nan")
    return f"head {positions:,} x {hidden_size:,}: limit {limit:.1f} ms, logits kept {kept:.1f}, computed again {again:.1f}"


def time_attention(name: str, lengths: Sequence[int], given: argparse.Namespace, device: torch.device) -> str:
    """Return one line: causal attention inside sequences of these lengths, in TFLOP/s."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    queries, keys = map(int, given.heads.split("x"))
    counts = (queries, keys, keys, queries)
    q, k, v, grad = (torch.randn(sum(lengths), count, HEAD_DIM, device=device, dtype=dtype) for count in counts)
    attention, scale = attention_of(name, lengths, device), HEAD_DIM**-0.5
    flops = 2 * queries * HEAD_DIM * sum(length**2 for length in lengths)  # of the visible half
    forward = median_ms(lambda: attention.forward(q, k, v, scale=scale), repeats=given.repeats)

    def both() -> None:
        result, kept = attention.forward(q, k, v, scale=scale)
        attention.backward(grad, q, k, v, result, kept, scale=scale)

    backward = median_ms(both, repeats=given.repeats) - forward
    return f"{name}: forward {flops / forward / 1e9:.1f}, backward {2.5 * flops / backward / 1e9:.1f} TFLOP/s"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", action="append", default=[], help="POSITIONSxHIDDEN of the head; may be repeated")
    parser.add_argument("--vocab-size", type=int, default=151936, help="rows of the head")
    parser.add_argument("--chunk-tokens", type=int, default=4096, help="positions whose logits exist at a time")
    parser.add_argument("--keep-logits", action="store_true", help="also time the head with all logits kept for the backward")
    parser.add_argument("--attention", action="append", default=[], help="lengths of sequences, as 1024,512; may be repeated")
    parser.add_argument("--heads", default="16x8", help="heads of queries x of keys")
    parser.add_argument("--kernel", nargs="+", default=["varlen"], help="--attn-implementation: cudnn, varlen or sdpa")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in given.head:
        positions, hidden_size = map(int, size.split("x"))
        print(time_head(positions, hidden_size, given, device))
    for text in given.attention:
        for name in given.kernel:
            print(time_attention(name, [int(length) for length in text.split(",")], given, device))


if __name__ == "__main__":
    main()
