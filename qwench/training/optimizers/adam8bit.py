"""AdamW of matrices with moments in 8 bits: each block of 256 values has a float32 maximum, and codes of a fixed table.

    moment x -> blocks -> x / max |x| -> nearest of 256 values, dense near 0 -> uint8         2.03 bytes for both moments

Steps compute in float32. A positive second moment is never rounded to 0, where a step would divide by --adam-eps alone.
Storing what was read gives the same codes, so that a resumed run is exact.

Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), dynamic tree quantisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.training.optimizers.host_adam import MOMENTS, HostAdam, adam_constants
from qwench.training.optimizers.pinned_buckets import Span

BLOCK = 256
_MAXIMA = ".absmax"


def dynamic_codes(*, signed: bool) -> Tensor:
    """Return the 256 values, ascending: 1, and below it decades of which each has half as many as the one above it."""
    values: list[Tensor] = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (exponent + (not signed)) + 1, dtype=torch.float64)
        values.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    positive = torch.cat([*values, torch.ones(1, dtype=torch.float64)])
    negative = -positive[1:].flip(0) if signed else positive[:0]
    return torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).float()


def quantised(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [N] uint8 and maxima of blocks [N / 256] float32 of values [N] float32."""
    blocks = functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    maxima = blocks.abs().amax(dim=1)
    shares = blocks / maxima.where(maxima > 0, 1.0)[:, None]
    chosen = torch.bucketize(shares, (codes[1:] + codes[:-1]) / 2)
    if codes[0] == 0:
        chosen = chosen.clamp_(min=1).where(blocks > 0, 0)
    return chosen.view(-1)[: len(values)].to(torch.uint8), maxima


def dequantised(chosen: Tensor, maxima: Tensor, codes: Tensor) -> Tensor:
    """Return the values [N] float32 of codes and maxima."""
    return codes[chosen.long()] * maxima.repeat_interleave(BLOCK)[: len(chosen)]


class Adam8bit(HostAdam):
    """Keeps masters as `HostAdam` does, all on the device, and moments as codes."""

    has_split_kernel = False

    def __init__(self, params: Iterable[dict[str, Any]], section: OptimizerConfig) -> None:
        """Take groups of parameters."""
        super().__init__(
            params,
            **adam_constants(section),
            offload_fraction=0.0,
            moment_dtypes=(torch.uint8, torch.uint8),
            splits_masters=True,
        )
        device = self._params()[0].device
        self._codes = {name: dynamic_codes(signed=name == MOMENTS[0]).to(device) for name in MOMENTS}

    @torch.no_grad()
    def reset(self) -> None:
        """See `HostAdam`; moments are 0 where the maximum of their block is."""
        super().reset()
        for param, state in self.state.items():
            blocks = -(-param.numel() // BLOCK)
            state |= {name + _MAXIMA: torch.zeros(blocks, device=param.device) for name in MOMENTS}

    def restart(self, num_steps: int) -> None:
        """See `HostAdam`."""
        super().restart(num_steps)
        for state in self.state.values():
            for name in MOMENTS:
                state[name + _MAXIMA].zero_()

    def device_tensors(self) -> list[Tensor]:
        """See `HostAdam`."""
        maxima = [state[name + _MAXIMA] for state in self.state.values() for name in MOMENTS]
        return [*super().device_tensors(), *maxima]

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """Return a moment of `param` in float32."""
        state = self.state[param]
        return dequantised(state[name].view(-1), state[name + _MAXIMA], self._codes[name]).view(param.shape)

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        """Write a moment of `param`, rounded to codes."""
        chosen, maxima = quantised(value.reshape(-1), self._codes[name])
        self.state[param][name].view(-1).copy_(chosen)
        self.state[param][name + _MAXIMA].copy_(maxima)

    def _widen(self, bucket: Sequence[Span], name: str) -> list[Tensor]:
        return [
            dequantised(span.of(self.state[span.param][name]), self._maxima_of(span, name), self._codes[name])
            for span in bucket
        ]

    def _store(self, bucket: Sequence[Span], name: str, widened: Sequence[Tensor]) -> None:
        for span, values in zip(bucket, widened, strict=True):
            chosen, maxima = quantised(values, self._codes[name])
            span.of(self.state[span.param][name]).copy_(chosen)
            self._maxima_of(span, name).copy_(maxima)

    def _maxima_of(self, span: Span, name: str) -> Tensor:
        """Return the maxima of the blocks of a span, which begins at a block."""
        maxima: Tensor = self.state[span.param][name + _MAXIMA]
        return maxima[span.start // BLOCK : -(-span.stop // BLOCK)]
