"""What an engine counts of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.scheduler import StepPlan
from qwench.engines.protocol import EngineStats


def count_step(stats: EngineStats, plan: StepPlan, requests: Sequence[RunningRequest], *, num_sampled: int) -> EngineStats:
    """Return the counters after one more step was taken."""
    first = [request for request in requests[len(plan.decodes) :] if request.num_output == 1]
    return replace(
        stats,
        prompt_tokens=stats.prompt_tokens + sum(request.num_prompt for request in first),
        cached_prompt_tokens=stats.cached_prompt_tokens + sum(request.cached_tokens for request in first),
        generated_tokens=stats.generated_tokens + num_sampled,
        num_preempted=stats.num_preempted + plan.num_preempted,
        decode_steps=stats.decode_steps + bool(plan.decodes),
    )
