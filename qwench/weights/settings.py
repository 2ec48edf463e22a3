"""How weights are published, as the user's flags say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwench.wire.portions import DEFAULT_BUCKET_BYTES

TransportName = Literal["nccl", "ipc", "broadcast", "disk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicationSettings:
    """Of every publication of a run; engines of the trainer's own process need none of it but the bucket's size."""

    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    transport: TransportName = "nccl"
    """nccl, the name that slime gives to its default: what `routes` says of each engine's place."""
    fp8: bool = False
    """Engines hold block-wise FP8: quantize what is published."""
    timeout_s: float = 600.0
    """For one engine to take one bucket (or, from disk, everything)."""
    disk_folder: Path | None = None
    """Where `disk` writes checkpoints; trainer and engines must both see it. None: a folder of this machine."""
    keep_disk_files: bool = False
    model_folder: Path | None = None
    """Whose config and tokenizer files `disk` adds to the weights."""

    @property
    def total_timeout_s(self) -> float:
        """Return the deadline of everything; each step has its own, which says more when it passes."""
        return 2 * self.timeout_s
