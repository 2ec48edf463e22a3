"""One group: its samples are generated side by side under a bound, and each is graded as soon as it ends.

    sample waits for a slot -> generated -> graded
                                 `- aborted: not graded, may go on in a later rollout

Grading needs no slot, so that slow rewards do not delay the engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from qwench.errors import QwenchError
from qwench.rollout.generate import GenerateContext, GenerateFunction, Requests, TokenSource
from qwench.rollout.sampling import Sampling
from qwench.samples import Group, Sample, Status, Verdict

Result = TypeVar("Result")
ABORT_AGAIN_S = 1.0
_UNFINISHED = (Status.PENDING, Status.ABORTED)


class Grader(Protocol):
    """The part of `rewards.pool.RewardPool` that rollouts need."""

    async def grade(self, sample: Sample) -> Verdict:
        """Return the verdict on one sample."""
        ...

    async def grade_group(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return one verdict for each sample of a group."""
        ...


class _OpenCalls:
    """Calls that have not returned, of the user's generate function and of the grader."""

    def __init__(self) -> None:
        self._since: dict[object, tuple[str, float]] = {}

    @contextmanager
    def within(self, label: str) -> Iterator[None]:
        """Count the block as an open call."""
        call = object()
        self._since[call] = label, time.monotonic()
        try:
            yield
        finally:
            del self._since[call]

    def describe(self) -> str:
        """Name the oldest open call; empty: none is open."""
        calls = list(self._since.values())
        if not calls:
            return ""
        label, since = min(calls, key=lambda call: call[1])
        return f"{label} has not returned for {time.monotonic() - since:.0f} s (open calls: {len(calls)})"


class Teacher(Protocol):
    """The part of `teacher.Teachers` that rollouts need."""

    async def teach(self, sample: Sample, policy: Requests) -> None:
        """Set the teacher's scores of a finished sample."""
        ...


class GroupRunner:
    """Generates and grades groups; all groups of one runner share its bound on samples in flight."""

    def __init__(
        self,
        engines: TokenSource,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        grader: Grader,
        concurrency: int,
        group_rm: bool,
        generate: GenerateFunction,
        generate_path: str | None,
        scope: str = "train",
        grades_executions: bool = False,
        teacher: Teacher | None = None,
        priority: int = 0,
    ) -> None:
        """Keep what every group needs.

        Args:
            concurrency: samples in flight at once: --sglang-server-concurrency times the number of engines.
            group_rm: grade a group at once, when its last sample has ended.
            generate_path: names the user's `generate` in reports of waits. None: the built-in one.
            scope: `train`, or the name of the evaluation set.
            grades_executions: grade the samples of one generate call together.
            teacher: scores every finished sample. None: there is none on a server.
            priority: of the requests, see `GenerateRequest`.
        """
        self.tokenizer, self.sampling = tokenizer, sampling
        self._requests = Requests(engines, priority=priority)
        self._grader = grader
        self._slots = asyncio.Semaphore(concurrency)
        self._group_rm = group_rm
        self._generate, self._generate_path = generate, generate_path
        self._open_calls = _OpenCalls()
        self._scope, self._grades_executions, self._teacher = scope, grades_executions, teacher

    def describe_calls(self) -> str:
        """Name the function that is late, its sample and the seconds so far; any thread may call."""
        return self._open_calls.describe()

    async def run(self, group: Group, *, rollout_id: int) -> Group:
        """Return the group finished and graded, or with aborted samples after `abort`."""
        executions = await gather_or_cancel(
            self._execute(sample, position, rollout_id) for position, sample in enumerate(group.samples)
        )
        samples = [sample for execution in executions for sample in execution]
        if self._group_rm:
            await self._grade_group(samples)
        return Group(group_id=group.group_id, samples=samples)

    async def abort(self, tasks: set[asyncio.Task[Group]]) -> list[Group]:
        """End what the engines still generate for `tasks` and return their groups as they are then, in order."""
        self._requests.aborting = True
        try:
            while any(not task.done() for task in tasks):
                # A request on its way to a server may miss the first abort: ask again until all have come back.
                await self._requests.abort_in_flight()
                await asyncio.wait(tasks, timeout=ABORT_AGAIN_S)
        finally:
            self._requests.aborting = False
        return sorted((task.result() for task in tasks), key=lambda group: group.group_id)

    async def _execute(self, sample: Sample, position: int, rollout_id: int) -> list[Sample]:
        """Generate the rest of one sample, and grade the result."""
        samples = [sample]
        if sample.status in _UNFINISHED:
            async with self._slots:
                samples = await self._call_generate(sample, position, rollout_id)
        if self._teacher is None:
            await self._grade_execution(samples)
        else:
            taught = (self._teach(sample, self._teacher) for sample in samples)
            await gather_or_cancel([self._grade_execution(samples), *taught])
        return samples

    async def _grade_execution(self, samples: list[Sample]) -> None:
        if self._group_rm:
            return
        if len(samples) == 1:
            await self._grade(samples[0])
        elif self._grades_executions:
            await self._grade_group(samples)
        else:
            await gather_or_cancel(self._grade(sample) for sample in samples)

    async def _teach(self, sample: Sample, teacher: Teacher) -> None:
        if sample.status in _UNFINISHED or self._requests.aborting or sample.teacher_log_probs:
            return
        with self._open_calls.within(f"the teacher of sample {sample.sample_id}"):
            await teacher.teach(sample, self._requests)

    async def _call_generate(self, sample: Sample, position: int, rollout_id: int) -> list[Sample]:
        if self._requests.aborting:
            sample.status = Status.ABORTED
            return [sample]
        context = GenerateContext(
            requests=self._requests,
            tokenizer=self.tokenizer,
            sampling=self.sampling,
            rollout_id=rollout_id,
            position=position,
            scope=self._scope,
        )
        prompt, sample_id, group_id = sample.prompt, sample.sample_id, sample.group_id
        try:
            answer = await self._call_function(sample, context)
        except asyncio.CancelledError:
            sample.status = Status.ABORTED  # also between two turns, where its last one is complete
            raise
        siblings = answer if isinstance(answer, list) else [answer]
        if not siblings:
            raise QwenchError(f"--custom-generate-function-path returned nothing for sample {sample_id}; return it at least.")
        for sibling in siblings:
            _check_generated(sibling)
            sibling.group_id, sibling.execution_id = group_id, sample_id
        if len(siblings) != 1 and any(sibling.status is Status.ABORTED for sibling in siblings):
            # One sibling alone cannot go on: the execution starts over.
            return [Sample(prompt=prompt, sample_id=sample_id, group_id=group_id, status=Status.ABORTED)]
        return siblings

    async def _call_function(self, sample: Sample, context: GenerateContext) -> Sample | list[Sample]:
        if self._generate_path is None:  # the engines report their requests
            return await self._generate(sample, context)
        with self._open_calls.within(f"{self._generate_path} for sample {sample.sample_id}"):
            return await self._generate(sample, context)

    async def _grade(self, sample: Sample) -> None:
        if self._may_grade([sample]):
            # A custom generate function may have graded its own sample.
            with self._open_calls.within(f"the reward of sample {sample.sample_id}"):
                _set_verdict(sample, sample.verdict or await self._grader.grade(sample))

    async def _grade_group(self, samples: list[Sample]) -> None:
        if self._may_grade(samples):
            with self._open_calls.within(f"the reward of group {samples[0].group_id}"):
                verdicts = await self._grader.grade_group(samples)
            for sample, verdict in zip(samples, verdicts, strict=True):
                _set_verdict(sample, verdict)

    def _may_grade(self, samples: Sequence[Sample]) -> bool:
        """Tell whether all samples have ended, not all are graded, and no abort is under way."""
        ended = all(sample.status not in _UNFINISHED for sample in samples)
        return ended and any(sample.reward is None for sample in samples) and not self._requests.aborting


def _set_verdict(sample: Sample, verdict: Verdict) -> None:
    """Store the verdict. A sample that could not be graded has reward 0; metrics count it and losses mask it."""
    sample.verdict = verdict
    sample.reward = verdict.score if verdict.graded else 0.0


def _check_generated(sample: Sample) -> None:
    """Check the samples that a custom function returned."""
    if not isinstance(sample, Sample):
        raise QwenchError(f"--custom-generate-function-path must return a Sample or a list of them, got {sample!r:.200}.")
    label = f"--custom-generate-function-path: sample {sample.sample_id}"
    if sample.status is Status.PENDING:
        raise QwenchError(f"{label} came back pending; call context.generate or set its status.")
    columns = (len(sample.loss_mask), len(sample.rollout_log_probs), len(sample.weight_versions))
    if set(columns) != {sample.response_length}:
        raise QwenchError(
            f"{label} has {sample.response_length} response tokens, but {columns[0]} mask entries, {columns[1]} log-probs and "
            f"{columns[2]} weight versions; use Sample.append, which keeps them equal."
        )


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Return all results in order; the first error cancels the others, waits for their end and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await cancel_and_wait(tasks)
        raise


async def cancel_and_wait(tasks: Collection[asyncio.Future[Result]]) -> None:
    """Cancel the tasks that are not done, and wait for all. Their errors are ignored here."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
