"""Low-rank adapters: the base model stays frozen, and two small matrices beside each projection are trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from qwench.config.limits import as_flag, check_not_negative, check_positive
from qwench.errors import ConfigError
from qwench.models.architecture import PROJECTIONS, adapter_scale

ALL_LINEAR = "all-linear"
_MEGATRON_NAMES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
_DEFAULT_ALPHA = 16.0
LoraInit = Literal["kaiming", "pissa"]
LoraBase = Literal["auto", "fp8", "nf4"]
LoraPublish = Literal["merged", "adapter"]
MERGE_FIRST = "to evaluate one, merge it by qwench convert --to hf, and give the output as --hf-checkpoint"
"""Advice for a user who gives an adapter to an evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """LoRA: train W + scale * B A in the place of W, with W frozen. The reference is the model without adapters."""

    lora_rank: int | None = None
    """Rank of LoRA adapters: rows of A and columns of B. None or 0: all weights are trained."""
    lora_alpha: float | None = None
    """Scale of the adapters, times the rank: they are added at --lora-alpha / --lora-rank. None: 16 for every rank."""
    lora_dropout: float = 0.0
    """Share of the inputs of A that a training pass sets to zero, 0 <= share < 1. Scoring and generation drop nothing."""
    target_modules: str | None = None
    """Projections with adapters, separated by commas: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, Megatron's
    linear_qkv, linear_proj, linear_fc1, linear_fc2, or all-linear for all of them. None: all-linear."""
    exclude_modules: str | None = None
    """Projections of --target-modules that have none, by the same names."""
    lora_init: LoraInit = "kaiming"
    """Start of the adapters. kaiming: A is random and B zero. pissa: the principal components of W, whose start is subtracted.
    Both begin as the base model."""
    lora_base: LoraBase = "auto"
    """Form of the frozen projections that have adapters. auto: --train-dtype. fp8: e4m3 in blocks of 128 x 128, 1 byte a
    weight. nf4: 4-bit normal floats in blocks of 64, 0.56 bytes. Under FSDP2 each rank holds all of them. Engines get
    the rounded weights."""
    use_rslora: bool = False
    """Add the adapters at --lora-alpha / sqrt(--lora-rank), which keeps their effect equal over ranks."""
    lora_publish: LoraPublish = "merged"
    """What engines get after each rollout. merged: all weights, with the adapter in them. adapter: A and B alone, which engines
    apply. The embedded engine gets the frozen weights once, and again after a restart. SGLang has them from --hf-checkpoint and
    reads each adapter from a folder (see --update-weight-disk-dir)."""
    lora_adapter_path: Path | None = None
    """PEFT folder of the adapter that a fresh run starts from, or folder of a run, whose newest adapter is taken. It must have
    the rank, scale and projections of the flags."""

    def __post_init__(self) -> None:
        check_not_negative("--lora-rank", self.lora_rank)
        check_positive("--lora-alpha", self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"--lora-dropout must be at least 0 and less than 1, got {self.lora_dropout}")
        if not self.targets:
            raise ConfigError(
                f"--exclude-modules {self.exclude_modules} leaves no projection of --target-modules; leave some of them in"
            )
        if self.lora_base != "auto" and self.lora_init == "pissa":
            raise ConfigError(f"--lora-base {self.lora_base} does not work with --lora-init pissa; choose kaiming")
        if not self.enabled:
            self._check_nothing_is_set()

    @property
    def enabled(self) -> bool:
        """Tell whether adapters are trained."""
        return self.rank > 0

    @property
    def rank(self) -> int:
        """Return the rank of the adapters; 0 without adapters."""
        return self.lora_rank or 0

    @property
    def alpha(self) -> float:
        """Return the scale of the adapters, times the rank."""
        return _DEFAULT_ALPHA if self.lora_alpha is None else self.lora_alpha

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the projections with adapters, in the order of the layer."""
        wanted = _projections("--target-modules", self.target_modules or ALL_LINEAR)
        wanted -= _projections("--exclude-modules", self.exclude_modules or "")
        return tuple(name for name in PROJECTIONS if name in wanted)

    @property
    def scale(self) -> float:
        """Return what B A is multiplied by."""
        return adapter_scale(self.rank, self.alpha, use_rslora=self.use_rslora)

    def _check_nothing_is_set(self) -> None:
        """Refuse flags of adapters that have no effect. A script may switch LoRA off by rank 0 and keep alpha or dropout."""
        kept = ("lora_rank",) if self.lora_rank is None else ("lora_rank", "lora_alpha", "lora_dropout")
        for item in fields(self):
            if item.name not in kept and getattr(self, item.name) != item.default:
                flag = as_flag(item.name)
                if item.name == "lora_adapter_path":
                    raise ConfigError(f"{flag} starts training from an adapter: give its --lora-rank; {MERGE_FIRST}")
                raise ConfigError(f"{flag} has no effect without adapters; give --lora-rank, or leave it out")


def _projections(flag: str, names: str) -> set[str]:
    """Return the projections that a list of names means.

    Raises:
        ConfigError: a name is none of a projection.
    """
    found: set[str] = set()
    for name in filter(None, (word.strip() for word in names.split(","))):
        if name == ALL_LINEAR:
            found |= set(PROJECTIONS)
        elif name in _MEGATRON_NAMES:
            found |= set(_MEGATRON_NAMES[name])
        elif name in PROJECTIONS:
            found.add(name)
        else:
            known = ", ".join((ALL_LINEAR, *PROJECTIONS, *_MEGATRON_NAMES))
            raise ConfigError(f"unknown name {name!r} in {flag}; known: {known}")
    return found
