"""Spread micro-batches over ranks so that all finish at about the same time (`--balance-data`)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from qwench.data.packing import Bin
from qwench.models.memory import SequenceCost


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
