"""Steps launched one ahead of those whose tokens were taken.

    without overlap:  launch 0, take 0, launch 1, take 1 ...
    with overlap:     launch 0, launch 1, take 0, launch 2, take 1 ...

Step n - 1 is taken exactly after step n was launched, even when its tokens are there earlier: batches depend on the requests
alone. A response that a stop token or string ends takes part in one step more, whose token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from qwench.engines.embedded.compute.runner import InFlight, Runner, Sampled
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.scheduler import Scheduler, StepPlan
from qwench.engines.embedded.scheduling.stopping import has_ended
from qwench.engines.embedded.worker import Worker
from qwench.engines.protocol import FinishReason
from qwench.errors import EngineError

Take = Callable[[Scheduler, InFlight, Sampled], None]


def take_step(
    step: InFlight, sampled: Sampled, *, version: int, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[RunningRequest], int]:
    """Give the requests of a step their tokens and scores; one that left since the launch (row -1) gets none.

    Returns:
        the requests that ended, and how many tokens were taken.
    """
    ended = list[RunningRequest]()
    num_taken = 0
    for index, (running, token, log_prob) in enumerate(zip(step.requests, *sampled, strict=True)):
        running.pending -= 1
        if running.row < 0:
            continue
        num_taken += 1
        running.tokens.append(token)
        running.log_probs.append(log_prob)
        running.weight_versions.append(version)
        if index in step.support:
            running.support.append(step.support[index])
        if running.progress is not None:
            running.progress.set()
        if running.finish_reason is None and has_ended(running, tokenizer):
            ended.append(running)
    for chunk, scores in zip(step.plan.scoring, step.scores, strict=True):
        if chunk.request.row >= 0:
            chunk.request.scored.append(scores)
    for chunk in step.plan.prefills:
        running = chunk.request
        if chunk.is_last and not chunk.samples and running.row >= 0 and running.finish_reason is None:
            running.finish_reason = FinishReason.LENGTH
            ended.append(running)
    return ended, num_taken


def failure_of_step(cause: Exception) -> EngineError:
    """Return what the callers of an engine get when a step fails."""
    if isinstance(cause, EngineError):
        return cause
    failure = EngineError(f"the embedded engine failed in a step: {type(cause).__name__}: {cause}")
    failure.__cause__ = cause
    return failure


class StepPipeline:
    """Holds the step in flight."""

    def __init__(self, runner: Runner, worker: Worker, take: Take, *, overlap: bool) -> None:
        """`take` receives what a step sampled."""
        self._runner = runner
        self._worker = worker
        self._take = take
        self._overlap = overlap
        self._in_flight: tuple[Scheduler, InFlight] | None = None

    async def step(self, scheduler: Scheduler) -> None:
        """Launch the next step, and take the one before it; without overlap take the new one too."""
        if scheduler.must_preempt():
            await self.drain()  # a request's tokens must be known before it is preempted
        plan = scheduler.plan()
        has_work = len(plan.decodes) + len(plan.prefills) > 0
        if self._overlap:
            await self._advance(scheduler, plan if has_work else None)
        elif has_work:
            await self._complete(scheduler, plan)

    async def drain(self) -> None:
        """Take the step in flight: then nothing runs, and all that was sampled is known."""
        if self._in_flight is not None:
            await self._advance(self._in_flight[0], None)

    def drop(self) -> None:
        """Forget the step in flight."""
        self._in_flight = None

    def close(self) -> None:
        """End the worker, and give the runner's memory back. That waits for the device, so not where its work never ends."""
        if not self._worker.is_lost:
            self._runner.close()
        self._worker.close()

    async def _complete(self, scheduler: Scheduler, plan: StepPlan) -> None:
        """Launch a step and take it: the worker is called once."""

        def work() -> tuple[InFlight, Sampled]:
            launched, _ = self._runner.advance(plan, scheduler.page_table, None)
            assert launched is not None, "there is a plan"
            return launched, self._runner.advance(None, scheduler.page_table, launched)[1]

        launched, sampled = await self._worker.call(work)
        self._commit(scheduler, launched)
        self._take(scheduler, launched, sampled)

    def _commit(self, scheduler: Scheduler, launched: InFlight) -> None:
        scheduler.commit(launched.plan)
        for running in launched.requests:
            running.pending += 1

    async def _advance(self, scheduler: Scheduler, plan: StepPlan | None) -> None:
        before, self._in_flight = self._in_flight, None
        in_flight = None if before is None else before[1]
        launched, sampled = await self._worker.call(lambda: self._runner.advance(plan, scheduler.page_table, in_flight))
        if launched is not None:
            self._commit(scheduler, launched)
            self._in_flight = scheduler, launched
        if in_flight is not None:
            self._take(scheduler, in_flight, sampled)
