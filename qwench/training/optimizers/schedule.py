"""Learning rate as a pure function of the optimizer steps done so far; Megatron-LM's shapes and edge cases.

    initial --linear warm-up--> peak --constant | linear | cosine | inverse-square-root--> minimum

A run of n steps uses `at(0)` to `at(n - 1)`, so with warm-up the first step has the initial rate.
"""

from __future__ import annotations

import math

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.errors import ConfigError


class LrSchedule:
    """Learning rate over a run; the decay ends with it unless --lr-decay-iters says otherwise.

    Source: Megatron-LM, `megatron/core/optimizer_param_scheduler.py`, counted in optimizer steps instead of samples.
    """

    def __init__(self, optimizer: OptimizerConfig, *, total_steps: int) -> None:
        """Lay the rates of `optimizer` over `total_steps` optimizer steps.

        Raises:
            ConfigError: nothing is left to decay after the warm-up.
        """
        assert optimizer.lr is not None, "config.checks requires --lr"
        self.peak = optimizer.lr
        self._optimizer = optimizer
        self._decay_steps = optimizer.lr_decay_iters or total_steps
        fraction = optimizer.lr_warmup_fraction
        self._warmup_steps = optimizer.lr_warmup_iters if fraction is None else int(fraction * self._decay_steps)
        if optimizer.lr_decay_style != "constant" and self._decay_steps <= self._warmup_steps:
            raise ConfigError(
                f"--lr-decay-style {optimizer.lr_decay_style} decays over {self._decay_steps} steps, of which "
                f"{self._warmup_steps} are warm-up; give --lr-decay-iters (or the length of the run) and a shorter "
                "--lr-warmup-iters."
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
        linear = self._optimizer.lr_decay_style == "linear"
        remaining = 1.0 - progress if linear else 0.5 * (math.cos(math.pi * progress) + 1.0)
        return minimum + remaining * (peak - minimum)
