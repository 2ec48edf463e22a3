"""Learning rate as a pure function of the optimizer steps done so far; Megatron-LM's shapes and edge cases.

    initial --linear warm-up--> peak --constant | linear | cosine | inverse-square-root | WSD--> minimum

A run of n steps uses `at(0)` to `at(n - 1)`, so with warm-up the first step has the initial rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.errors import ConfigError

_REMAINING: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (math.cos(math.pi * progress) + 1.0),
    "exponential": lambda progress: 2.0 * 0.5**progress - 1.0,
    "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Shape of a decay -> share of the way from minimum to peak that is left at a progress from 0 to 1."""


class LrSchedule:
    """Learning rate over a run; the decay ends with it unless --lr-decay-iters says otherwise.

    Source: Megatron-LM, `megatron/core/optimizer_param_scheduler.py`, counted in optimizer steps instead of samples.
    """

    def __init__(self, optimizer: OptimizerConfig, *, total_steps: int) -> None:
        """Lay the rates of `optimizer` over `total_steps` optimizer steps.

        Raises:
            ConfigError: nothing is left to decay after the warm-up.
        """
        assert optimizer.lr is not None, "config.verb_checks requires --lr"
        self.peak = optimizer.lr
        self._optimizer = optimizer
        self._decay_steps = optimizer.lr_decay_iters or total_steps
        fraction = optimizer.lr_warmup_fraction
        self._warmup_steps = optimizer.lr_warmup_iters if fraction is None else fraction * self._decay_steps
        if optimizer.lr_decay_style != "constant" and self._decay_steps <= self._warmup_steps:
            raise ConfigError(
                f"--lr-decay-style {optimizer.lr_decay_style} decays over {self._decay_steps} steps, of which "
                f"{self._warmup_steps:g} are warm-up; give --lr-decay-iters (or the length of the run) and a shorter "
                "--lr-warmup-iters."
            )
        wsd_steps = optimizer.lr_wsd_decay_iters
        if wsd_steps is not None and wsd_steps > self._decay_steps - self._warmup_steps:
            raise ConfigError(
                f"--lr-wsd-decay-iters {wsd_steps} is more than the {self._decay_steps - self._warmup_steps:g} steps between "
                "the warm-up and the end of --lr-decay-iters (or of the run); lower it."
            )

    def at(self, step: int) -> float:
        """Return the learning rate of the optimizer step after `step` earlier ones."""
        peak, initial, minimum = self.peak, self._optimizer.lr_warmup_init, self._optimizer.min_lr
        if self._warmup_steps > 0 and step <= self._warmup_steps:
            return initial + (peak - initial) * step / self._warmup_steps
        if self._optimizer.lr_decay_style == "constant":
            return peak
        if step > self._decay_steps:
            return minimum
        if self._optimizer.lr_decay_style == "inverse-square-root":
            return max(minimum, peak * math.sqrt(max(self._warmup_steps, 1) / max(step, 1)))
        progress = (step - self._warmup_steps) / (self._decay_steps - self._warmup_steps)
        shape: str = self._optimizer.lr_decay_style
        if shape == "WSD":
            assert self._optimizer.lr_wsd_decay_iters is not None, "the section requires --lr-wsd-decay-iters"
            shape = self._optimizer.lr_wsd_decay_style
            decay = self._optimizer.lr_wsd_decay_iters
            progress = max(step - (self._decay_steps - decay), 0) / decay
        remaining = _REMAINING[shape](progress)
        return minimum + remaining * (peak - minimum)
