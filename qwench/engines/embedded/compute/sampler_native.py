"""`sampler.sample` without limits in C++: two passes over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from qwench.engines.embedded.compute.sampler import Draws
from qwench.models.decoder.native.library import Kernel, threads_for

SHARED_FROM = 2**14
"""Logits from which threads share the rows."""
_draw = Kernel("draw", "ppppppplli")


def draw(logits_SV: Tensor, draws: Draws, last_tokens: Tensor, drawn: Tensor) -> None:
    """Draw a token for each row of logits [S, V] float32; limits are ignored.

    Args:
        last_tokens: int32, gets each row's token.
        drawn: [2, S] int32, rows dense; receives tokens, and the bits of their float32 log-probs.
    """
    logits_SV = logits_SV.contiguous()
    columns = (draws.params.temperature, draws.params.uniforms, draws.rows)
    temperature, uniforms, rows = (torch.from_numpy(column) for column in columns)
    _draw.of(logits_SV.dtype)(
        logits_SV.data_ptr(),
        temperature.data_ptr(),
        uniforms.data_ptr(),
        rows.data_ptr(),
        last_tokens.data_ptr(),
        drawn[0].data_ptr(),
        drawn[1].data_ptr(),
        *logits_SV.shape,
        threads_for(logits_SV.numel(), smallest=SHARED_FROM),
    )
