"""The checksum of one tensor, by the functions that take many."""

from __future__ import annotations

from torch import Tensor

from qwench.engines.kinds.sglang_ledger import finished_hash, sum_of_tiles
from qwench.wire.checksum import tensor_checksums


def tensor_checksum(tensor: Tensor) -> int:
    """Return the checksum by which a publication is confirmed."""
    return tensor_checksums([("", tensor)])[""]


def sglang_hash(tensor: Tensor) -> int:
    """Return SGLang's unsigned 64-bit hash."""
    return finished_hash(int(sum_of_tiles(tensor)))
