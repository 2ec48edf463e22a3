"""A checksum of tensors that CPU and GPU compute alike, to confirm that published weights arrived whole.

    sum of word[i] * factor[i] modulo 2**64,     factor[i] = (i + 1) * 0x9E3779B1 modulo 2**32

Words are the tensor's bytes four at a time, zeros after the last; words and factors count as signed 32-bit integers. No two
factors of a tensor are equal and none is 0. So one changed word, or one swap of two different words, changes the sum. It
depends on no device and no order of summation, and it costs a GPU one multiplication a word: memory bounds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

WORD_BYTES = 4
FACTOR = 0x9E3779B1 - 2**32
"""2**32 over the golden ratio, as a signed integer: odd, so that its multiples differ."""
_LENGTH_MULTIPLIER = 6_364_136_223_846_793_005
_WORDS_AT_ONCE = 1 << 18
"""On the host: its int64 temporaries of 2 MiB stay in the cache, which is ten times as fast as from memory."""


class PendingChecksums:
    """Checksums of tensors that come one after the other; a GPU computes them in the background and is waited for once."""

    def __init__(self) -> None:
        self._lengths: list[tuple[str, int]] = []
        self._sums: list[Tensor] = []

    def add(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Start on some tensors of one device; they may be written or freed afterwards, in the order of its stream."""
        pairs = list(named)
        if pairs:
            self._lengths += [(name, tensor.numel() * 16 + tensor.element_size()) for name, tensor in pairs]
            self._sums.append(_word_sums([_words(tensor) for _, tensor in pairs]))

    def read(self) -> dict[str, int]:
        """Return the checksum of each tensor added so far by its name: signed 64-bit, of its bits, element size and length."""
        if not self._sums:
            return {}
        totals = torch.cat(self._sums).tolist()
        return {
            name: _signed(total * _LENGTH_MULTIPLIER + length)
            for (name, length), total in zip(self._lengths, totals, strict=True)
        }


def tensor_checksums(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Return the checksum of each tensor by its name."""
    pending = PendingChecksums()
    pending.add(named)
    return pending.read()


def _words(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes as int32 [n]: a view where its place in memory allows it, or on a GPU the tensor itself."""
    if tensor.is_cuda and tensor.is_contiguous() and not (tensor.nbytes | tensor.data_ptr()) % WORD_BYTES:
        return tensor  # one of hundreds: making views takes longer than the sums
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    missing = -octets.numel() % WORD_BYTES
    if missing:
        octets = functional.pad(octets, (0, missing))
    elif octets.storage_offset() % WORD_BYTES:
        octets = octets.clone()
    return octets.view(torch.int32)


def _word_sums(words: Sequence[Tensor]) -> Tensor:
    """Return the sum of each tensor's words times their factors, [len(words)] int64 on their device."""
    if words[0].is_cuda:
        from qwench.wire import checksum_triton  # noqa: PLC0415  # Triton exists only where CUDA (or ROCm) does

        return checksum_triton.word_sums(words, factor=FACTOR)
    return torch.stack([_word_sum(one) for one in words])


def _word_sum(words: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64)
    for start in range(0, words.numel(), _WORDS_AT_ONCE):
        part = words[start : start + _WORDS_AT_ONCE].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64)
        total += (part * (place * FACTOR).to(torch.int32)).sum()
    return total


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
