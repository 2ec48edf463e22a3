"""Learning rate as a pure function of the optimizer steps done so far; Megatron-LM's shapes and edge cases.

    initial --linear warm-up--> peak --constant | linear | cosine | inverse-square-root--> minimum

A run of n steps uses `at(0)` to `at(n - 1)`, so with warm-up the first step has the initial rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwench.errors import ConfigError

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")


@dataclass(frozen=True, kw_only=True, slots=True)
class LrSchedule:
    """Learning rate over a run.

    Source: Megatron-LM, `megatron/core/optimizer_param_scheduler.py`, counted in optimizer steps instead of samples.
    """

    peak: float
    style: str = "constant"
    minimum: float = 0.0
    initial: float = 0.0
    """Where warm-up starts."""
    warmup_steps: int = 0
    decay_steps: int = 0
    """Step at which `minimum` is reached, warm-up included; the constant style does not use it."""

    def __post_init__(self) -> None:
        if self.style not in DECAY_STYLES:
            raise ConfigError(f"unknown --lr-decay-style {self.style!r}; known: {', '.join(DECAY_STYLES)}.")
        if self.minimum > self.peak or self.initial > self.peak:
            raise ConfigError(
                f"--min-lr ({self.minimum}) and --lr-warmup-init ({self.initial}) must not exceed --lr ({self.peak})."
            )
        if self.style != "constant" and self.decay_steps <= self.warmup_steps:
            raise ConfigError(
                f"--lr-decay-style {self.style} decays over {self.decay_steps} steps, of which {self.warmup_steps} are "
                "warm-up; give --lr-decay-iters (or the length of the run) and a shorter --lr-warmup-iters."
            )

    def at(self, step: int) -> float:
        """Return the learning rate of the optimizer step after `step` earlier ones."""
        if self.warmup_steps > 0 and step <= self.warmup_steps:
            return self.initial + (self.peak - self.initial) * step / self.warmup_steps
        if self.style == "constant":
            return self.peak
        if step > self.decay_steps:
            return self.minimum
        if self.style == "inverse-square-root":
            return max(self.minimum, self.peak * math.sqrt(max(self.warmup_steps, 1) / max(step, 1)))
        progress = (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
        remaining = 1.0 - progress if self.style == "linear" else 0.5 * (math.cos(math.pi * progress) + 1.0)
        return self.minimum + remaining * (self.peak - self.minimum)
