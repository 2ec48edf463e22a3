"""Samples that share a micro-batch: bins of sample indices under a token cap, and the ranks that compute them.

    lengths 700 300 500 400, cap 1000, 2 ranks    first fit: [0 1] [2 3]      rank 0 takes [0 1], rank 1 takes [2 3]
    lengths 700 300 500 400, cap 1000, 3 ranks    split:     [0] [1] [2 3]

`deal` gives each rank as many bins; `balance` also makes their costs nearly equal. Plans depend on lengths alone, so every rank
that plans gets the same answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from qwench.models.memory import SequenceCost

Bin = list[int]
"""Indices of the samples of one micro-batch; empty where a rank has nothing to do."""
_SLACKS = (1.01, 1.04, 1.1)
"""Caps to try, over the mean load of a bin: without them the last bin gets what is left, which may be one short sample."""


def pack_by_tokens(lengths: Sequence[int], *, max_tokens: int, multiple_of: int = 1) -> list[Bin]:
    """Fill as few bins as first-fit in order of index needs, evenly; a sample longer than the cap sits alone and exceeds it.

    Args:
        lengths: tokens of each sample.
        max_tokens: cap on the sum of a bin.
        multiple_of: the number of bins is raised to a multiple of this by splitting, and by empty bins when every bin holds
            one sample already.
    """
    bins = _first_fit(lengths, max_tokens)
    for slack in _SLACKS:
        cap = min(max_tokens, int(slack * sum(lengths) / max(len(bins), 1)))
        even = _first_fit(lengths, cap)
        if len(even) <= len(bins):
            bins = even
            break
    return _raise_count(bins, lengths, multiple_of)


def pack_by_count(lengths: Sequence[int], *, samples_per_bin: int, multiple_of: int = 1) -> list[Bin]:
    """Fill bins with `samples_per_bin` samples each, in order of index; see `pack_by_tokens` for `multiple_of`."""
    starts = range(0, len(lengths), samples_per_bin)
    bins = [list(range(start, min(start + samples_per_bin, len(lengths)))) for start in starts]
    return _raise_count(bins, lengths, multiple_of)


def _first_fit(lengths: Sequence[int], max_tokens: int) -> list[Bin]:
    bins: list[Bin] = []
    loads: list[int] = []
    for i, length in enumerate(lengths):
        k = next((k for k, load in enumerate(loads) if load + length <= max_tokens), None)
        if k is None:
            bins.append([i])
            loads.append(length)
        else:
            bins[k].append(i)
            loads[k] += length
    return bins


def deal(bins: Sequence[Bin], dp_size: int) -> list[list[Bin]]:
    """Give bin k to rank k modulo `dp_size`, so that every rank gets as many.

    Returns:
        dp_size lists of bins.
    """
    assert len(bins) % dp_size == 0, f"{len(bins)} bins cannot be dealt evenly to {dp_size} ranks"
    return [list(bins[rank::dp_size]) for rank in range(dp_size)]


def _raise_count(bins: list[Bin], lengths: Sequence[int], multiple_of: int) -> list[Bin]:
    wanted = -(-max(len(bins), 1) // multiple_of) * multiple_of
    while len(bins) < wanted:
        splittable = [k for k, members in enumerate(bins) if len(members) > 1]
        if not splittable:
            return bins + [[] for _ in range(wanted - len(bins))]
        largest = max(splittable, key=lambda k: sum(lengths[i] for i in bins[k]))
        bins[largest : largest + 1] = _split_in_two(bins[largest], lengths)
    return bins


def _split_in_two(members: Bin, lengths: Sequence[int]) -> tuple[Bin, Bin]:
    """Halve a bin, longest sample first to the lighter half (LPT); both halves get at least one sample."""
    halves: tuple[Bin, Bin] = ([], [])
    loads = [0, 0]
    for i in sorted(members, key=lambda i: (-lengths[i], i)):
        lighter = int(loads[1] < loads[0])
        halves[lighter].append(i)
        loads[lighter] += lengths[i]
    return sorted(halves[0]), sorted(halves[1])


def balance(bins: Sequence[Bin], lengths: Sequence[int], *, dp_size: int, cost: SequenceCost) -> list[list[Bin]]:
    """Give every rank as many bins, with sums of cost as equal as Karmarkar-Karp gets them.

    Returns:
        dp_size lists of bins, in order of their position in `bins`.
    """
    costs = [sum(cost.of(lengths[i]) for i in members) for members in bins]
    return [[bins[k] for k in sorted(part)] for part in partition_equally(costs, dp_size)]


def partition_equally(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Split indices into parts of equal count and nearly equal sum: the largest differencing method.

    Start from sets of `num_parts` neighbours in order of cost, one for each part. Merge the two sets whose parts differ most,
    largest part with smallest, until one is left. Counts stay equal because each set gives every part one index.

    Source: Karmarkar and Karp, The differencing method of set partitioning (1982).
    """
    assert len(costs) % num_parts == 0, f"{len(costs)} costs cannot be split into {num_parts} parts of equal count"
    if not costs:
        return [[] for _ in range(num_parts)]
    order = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    heap: list[tuple[float, int, list[_Part]]] = []
    for serial, start in enumerate(range(0, len(order), num_parts)):
        parts = [_Part(costs[i], [i]) for i in order[start : start + num_parts]]
        heapq.heappush(heap, (-_spread(parts), serial, parts))
    serial = len(heap)
    while len(heap) > 1:
        (_, _, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        pairs = zip(sorted(first), sorted(second, reverse=True), strict=True)
        merged = [_Part(a.total + b.total, a.indices + b.indices) for a, b in pairs]
        heapq.heappush(heap, (-_spread(merged), serial, merged))
        serial += 1
    return sorted(part.indices for part in heap[0][2])


@dataclass(frozen=True, slots=True, order=True)
class _Part:
    total: float
    indices: list[int]


def _spread(parts: Sequence[_Part]) -> float:
    totals = [part.total for part in parts]
    return max(totals) - min(totals)
