"""Checksums of what was sent in one publication, and their comparison with what an engine holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol

from qwench.engines.protocol import WeightReceipt
from qwench.errors import WeightSyncError
from qwench.wire.checksum import PendingChecksums
from qwench.wire.portions import WeightBucket


class Ledger(Protocol):
    """What was sent in one publication, for comparison with what engines hold."""

    def note(self, bucket: WeightBucket) -> None:
        """Add what is sent next."""
        ...


class ChecksumLedger:
    """Our own checksums, computed where the tensors lie."""

    def __init__(self) -> None:
        self._pending = PendingChecksums()

    @property
    def checksums(self) -> dict[str, int]:
        """Return each tensor's; waits for the device."""
        return self._pending.read()

    def note(self, bucket: WeightBucket) -> None:
        """See `Ledger`."""
        self._pending.add(bucket)


def noted(buckets: Iterable[WeightBucket], ledgers: Collection[Ledger]) -> Iterator[WeightBucket]:
    """Yield the buckets, and note each in every ledger."""
    for bucket in buckets:
        for ledger in ledgers:
            ledger.note(bucket)
        yield bucket


def check_version(engine: object, held: int, version: int) -> None:
    """Make sure that an engine confirmed the version that was published.

    Raises:
        WeightSyncError: it confirmed another one.
    """
    if held != version:
        raise WeightSyncError(f"{engine!r} confirmed weight version {held} when {version} was published.")


def check_checksums(engine: object, receipt: WeightReceipt, sent: Mapping[str, int]) -> None:
    """Compare the checksum of every tensor at both ends.

    Raises:
        WeightSyncError: one differs or is missing; names it.
    """
    wrong = sorted(name for name, checksum in sent.items() if receipt.checksums.get(name) != checksum)
    if wrong:
        name = wrong[0]
        raise WeightSyncError(
            f"weight version {receipt.version}: tensor {name!r} of {engine!r} has checksum {receipt.checksums.get(name)}, "
            f"sent was {sent[name]} ({len(wrong)} of {len(sent)} tensors differ)."
        )
