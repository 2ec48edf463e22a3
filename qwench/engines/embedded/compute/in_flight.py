"""A step that was launched, and whose tokens may not be on the host yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.scheduler import StepPlan

Sampled = tuple[Sequence[int], Sequence[float]]
"""Tokens and their log-probs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """A launched step."""

    plan: StepPlan
    requests: list[RunningRequest]
    """Who gets a token, as `plan.sampling` was at launch."""
    drawn: Tensor
    """[2, S] int32 on the host, once `arrived`: tokens, and the bits of their float32 log-probs."""
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, plan: StepPlan, requests: list[RunningRequest], drawn: Tensor) -> InFlight:
        """Start to copy what was drawn to the host."""
        if not drawn.is_cuda:
            return cls(plan=plan, requests=requests, drawn=drawn, arrived=None)
        host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
        host.copy_(drawn, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(plan=plan, requests=requests, drawn=host, arrived=arrived)

    def wait(self) -> Sampled:
        """Return what was sampled for `requests`."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.drawn[0].tolist(), self.drawn[1].view(torch.float32).tolist()
