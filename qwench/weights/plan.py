"""What the publications of a run share, and what one of them brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwench.config.sections.engine import EngineConfig
from qwench.models.peft import AdapterConfig
from qwench.weights.local import QuantizedWeights, WeightSource
from qwench.wire.portions import WeightPart

AfterWrite = Callable[[Path, Sequence[str]], None]
"""(folder of the files, addresses of the engines that will read it)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedAdapter:
    """An adapter that engines read from a folder and requests name; picklable."""

    config: AdapterConfig
    name: str = ""
    """Of this publication alone."""
    retired: tuple[str, ...] = ()
    """Names of earlier publications, which engines forget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicationPlan:
    """Settings that all publications of a run share; picklable."""

    engine: EngineConfig
    """The --update-weight-* flags."""
    model_folder: Path | None = None
    """Its config and tokenizer files are added to weights that are published from disk."""
    fp8: bool = False
    """Engines hold block-wise FP8: quantize what is published."""
    after_write: AfterWrite | None = None
    """The user's function between the files of a publication from disk and their reading; picklable."""
    adapters: bool = False
    """Publish adapters alone to engines that hold the frozen weights (--lora-publish adapter)."""
    frozen_moves: bool = False
    """A teacher takes the place of the frozen weights while it scores."""
    named: NamedAdapter | None = None
    """The adapter, if engines take it by name. They have the frozen weights then."""
    part: WeightPart = "merged"
    """What this publication brings."""
    timeout_s: float
    """For one engine to take one bucket, or from disk all weights."""

    @property
    def total_timeout_s(self) -> float:
        """Return the deadline of the whole publication. Each step has another one, whose message says more."""
        return 2 * self.timeout_s

    def source_of(self, source: WeightSource) -> WeightSource:
        """Return the source of the weights in the form that engines take."""
        return QuantizedWeights(source) if self.fp8 else source
