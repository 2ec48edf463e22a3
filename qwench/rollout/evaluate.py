"""Measure the policy on evaluation sets (`--eval-prompt-data name path ...`).

eval/<name>                      mean reward; a response that could not be graded counts as 0
eval/<name>-none_reward_ratio    share of those
eval/<name>-truncated_ratio
eval/<name>-pass@k               with --log-passrate
eval/<name>/response_len/mean    and the other sample metrics of a rollout
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from qwench.engines.fleet.pool import EnginePool, Waiter
from qwench.errors import EngineError
from qwench.observability.console import Console
from qwench.observability.waiting import joined
from qwench.rewards.degenerate import degenerate_reason
from qwench.rollout.generate import GenerateFunction
from qwench.rollout.groups import Grader, GroupRunner, gather_or_cancel
from qwench.rollout.sample_metrics import pass_rates, sample_metrics, with_prefix
from qwench.rollout.sampling import Sampling
from qwench.samples import Group, Prompt, Sample

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """A named set of prompts, the sampling of its responses, and its own functions."""

    name: str
    prompts: Sequence[Prompt]
    n_samples_per_prompt: int
    sampling: Sampling
    grader: Grader | None = None
    """None: that of the evaluator."""
    generate: GenerateFunction | None = None
    """None: that of the evaluator."""
    generate_path: str | None = None
    """Names `generate` in reports of waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """The graded responses to one set, in the order of its prompts."""

    name: str
    groups: Sequence[Group]

    @property
    def samples(self) -> list[Sample]:
        """Return all samples; `Sample.to_record` makes a JSON line of one."""
        return [sample for group in self.groups for sample in group.samples]

    @property
    def score(self) -> float:
        """Return the mean reward."""
        return fmean(sample.reward if sample.reward is not None else 0.0 for sample in self.samples)

    def metrics(self, *, with_pass_rates: bool) -> dict[str, float]:
        """Return the metrics of the module docstring."""
        described = sample_metrics(self.samples)
        return {
            f"eval/{self.name}": self.score,
            f"eval/{self.name}-truncated_ratio": described["truncated_ratio"],
            f"eval/{self.name}-none_reward_ratio": fmean(float(not sample.graded) for sample in self.samples),
            **with_prefix(f"eval/{self.name}-", pass_rates(self.groups) if with_pass_rates else {}),
            **with_prefix(f"eval/{self.name}/", described),
        }


RunSet = Callable[[EvalSet], Awaitable[EvalResult]]
EvalFunction = Callable[[Sequence[EvalSet], RunSet], Awaitable[Mapping[str, float]]]
"""A `--eval-function-path` function: (sets, function that answers and grades one) -> eval/... metrics."""
LogEvaluation = Callable[[Sequence[EvalResult], Mapping[str, float]], bool]
"""(results, metrics) -> true: the metrics are logged already."""


class Evaluator:
    """Answers and grades every set, one set after the other."""

    def __init__(
        self,
        sets: Sequence[EvalSet],
        *,
        tokenizer: PreTrainedTokenizerBase,
        grader: Grader,
        concurrency: int,
        console: Console,
        timeout_s: float | None,
        group_rm: bool,
        generate: GenerateFunction,
        generate_path: str | None,
        function: EvalFunction | None,
        log_passrate: bool,
        log: LogEvaluation | None,
        priority: int,
    ) -> None:
        """Keep what an evaluation needs.

        Args:
            concurrency: samples in flight at once, over all engines.
            timeout_s: deadline of one set. None: no deadline.
            generate_path: names the user's `generate` in reports of waits. None: the built-in one.
            function: replaces the built-in evaluation.
            priority: of the requests, see `GenerateRequest`.
        """
        self._sets, self._tokenizer, self._grader, self._concurrency = sets, tokenizer, grader, concurrency
        self._timeout_s = timeout_s
        self._console, self._group_rm = console, group_rm
        self._generate, self._generate_path = generate, generate_path
        self._runner: GroupRunner | None = None
        """Of the set that is answered now."""
        self._function, self._log_passrate, self._log, self._priority = function, log_passrate, log, priority

    def evaluate(self, engines: EnginePool, waiter: Waiter | None = None) -> dict[str, float]:
        """Return the `eval/...` metrics of all sets; `waiter` waits for the engines instead of the pool.

        Raises:
            QwenchError: an engine or a reward failed.
        """
        if self._function is None:
            results = self.run(engines, waiter)
            metrics = self.summarize(results)
            return {} if self._log is not None and self._log(results, metrics) else metrics

        async def call(function: EvalFunction) -> Mapping[str, float]:
            return await function(self._sets, lambda eval_set: self._run_set(engines, eval_set))

        return dict(
            (waiter or engines).attend(
                call(self._function),
                label="evaluation",
                timeout_s=self._timeout_s,
                describe=lambda: self._describe(engines),
            )
        )

    def run(self, engines: EnginePool, waiter: Waiter | None = None) -> list[EvalResult]:
        """Answer and grade all sets, and keep every sample."""
        return [
            (waiter or engines).attend(
                self._run_set(engines, eval_set),
                label=f"evaluation of {eval_set.name}",
                timeout_s=self._timeout_s,
                describe=lambda: self._describe(engines),
            )
            for eval_set in self._sets
        ]

    async def measure(self, engines: EnginePool) -> dict[str, float]:
        """Return what `evaluate` returns, on the engines' loop.

        Raises:
            EngineError: a set was not answered before the deadline.
        """
        results, function = list[EvalResult](), self._function
        try:
            async with asyncio.timeout(None if self._timeout_s is None else self._timeout_s * len(self._sets)):
                if function is not None:
                    return dict(await function(self._sets, lambda eval_set: self._run_set(engines, eval_set)))
                for eval_set in self._sets:
                    results.append(await self._run_set(engines, eval_set))
        except TimeoutError as error:
            raise EngineError(f"an evaluation beside training took longer than {self._timeout_s:g} s a set.") from error
        metrics = self.summarize(results)
        logged = self._log is not None and await asyncio.to_thread(self._log, results, metrics)
        return {} if logged else metrics

    def summarize(self, results: Sequence[EvalResult]) -> dict[str, float]:
        """Return the metrics of all results; warn of a set whose rewards are broken rather than low."""
        metrics: dict[str, float] = {}
        for result in results:
            metrics.update(result.metrics(with_pass_rates=self._log_passrate))
            verdicts = [sample.verdict for sample in result.samples if sample.verdict is not None]
            if (reason := degenerate_reason(verdicts, length_flag="--eval-max-response-len")) is not None:
                _logger.warning("evaluation of %s: %s", result.name, reason)
        return metrics

    def _describe(self, engines: EnginePool) -> str:
        calls = "" if self._runner is None else self._runner.describe_calls()
        return joined(calls, engines.describe_requests())

    async def _run_set(self, engines: EnginePool, eval_set: EvalSet) -> EvalResult:
        runner = self._runner = GroupRunner(
            engines,
            tokenizer=self._tokenizer,
            sampling=eval_set.sampling,
            grader=eval_set.grader or self._grader,
            concurrency=self._concurrency,
            group_rm=self._group_rm,
            generate=eval_set.generate or self._generate,
            generate_path=self._generate_path if eval_set.generate is None else eval_set.generate_path,
            scope=f"eval/{eval_set.name}",
            priority=self._priority,
        )
        with self._console.progress(f"evaluate {eval_set.name}", total=len(eval_set.prompts)) as progress:

            async def run_group(group: Group) -> Group:
                finished = await runner.run(group, rollout_id=0)
                progress.advance(1)
                return finished

            groups = await gather_or_cancel(run_group(group) for group in _groups(eval_set))
        return EvalResult(name=eval_set.name, groups=groups)


def _groups(eval_set: EvalSet) -> list[Group]:
    """Make a group of pending samples for each prompt; ids count within the set."""
    n = eval_set.n_samples_per_prompt
    return [
        Group(
            group_id=row,
            samples=[
                Sample(prompt=prompt, sample_id=row * n + i, group_id=row, metadata=dict(prompt.metadata)) for i in range(n)
            ],
        )
        for row, prompt in enumerate(eval_set.prompts)
    ]
