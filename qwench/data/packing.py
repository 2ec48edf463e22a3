"""Which samples share a micro-batch: bins of sample indices under a token cap, their number a multiple of the ranks.

    lengths 700 300 500 400, cap 1000, 2 ranks    first fit: [0 1] [2 3]      rank 0 takes [0 1], rank 1 takes [2 3]
    lengths 700 300 500 400, cap 1000, 3 ranks    split:     [0] [1] [2 3]

Plans depend on lengths alone, so every rank that plans gets the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence

Bin = list[int]
"""Indices of the samples of one micro-batch; empty where a rank has nothing to do."""


def pack_by_tokens(lengths: Sequence[int], *, max_tokens: int, multiple_of: int = 1) -> list[Bin]:
    """Fill bins first-fit in order of index; a sample longer than the cap sits alone and exceeds it.

    Args:
        lengths: tokens of each sample.
        max_tokens: cap on the sum of a bin.
        multiple_of: the number of bins is raised to a multiple of this by splitting, and by empty bins when every bin holds
            one sample already.
    """
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
    return _raise_count(bins, lengths, multiple_of)


def pack_by_count(lengths: Sequence[int], *, samples_per_bin: int, multiple_of: int = 1) -> list[Bin]:
    """Fill bins with `samples_per_bin` samples each, in order of index; see `pack_by_tokens` for `multiple_of`."""
    starts = range(0, len(lengths), samples_per_bin)
    bins = [list(range(start, min(start + samples_per_bin, len(lengths)))) for start in starts]
    return _raise_count(bins, lengths, multiple_of)


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
