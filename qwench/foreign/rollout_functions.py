"""Functions of a rollout in slime's and miles' convention, as functions of ours.

--custom-generate-function-path      await fn(args, sample, sampling_params[, evaluation=]) | await fn(input)
--rollout-function-path              fn(args, rollout_id, data_source, evaluation=False) | class
--dynamic-sampling-filter-path       fn(args, samples)
--buffer-filter-path                 fn(args, rollout_id, buffer, num_samples)
--rollout-sample-filter-path         fn(args, groups)
--rollout-all-samples-process-path   fn(args, groups, data_source)
--eval-function-path                 the same with evaluation=True; without it the function of --rollout-function-path
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qwench.errors import QwenchError
from qwench.foreign import loading
from qwench.foreign import sample as theirs
from qwench.foreign.gateway import CURRENT_CALL, Call
from qwench.foreign.reward import call_anyhow
from qwench.foreign.sample import Foreign, leaves
from qwench.foreign.session import GenerateState, Session, current_session, sampling_params
from qwench.foreign.translate import from_foreign, to_foreign, to_groups
from qwench.plugins import check_signature
from qwench.rollout.evaluate import EvalResult, EvalSet, LogEvaluation, RunSet
from qwench.rollout.filters import FilterResult
from qwench.rollout.functions import LogRollout, RolloutContext
from qwench.rollout.generate import GenerateContext, GenerateFunction
from qwench.samples import Group, Rollout, Sample

Function = Callable[..., Foreign]


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """Makes functions of ours from theirs."""

    as_text: bool
    """Prompts are rendered texts (--apply-chat-template)."""

    def generate(self, named: Foreign, path: str) -> Function:
        """Return a `GenerateFunction`; a class is made once, and its instance called."""
        flag = "--custom-generate-function-path"
        function: Function = _made(named)
        in_one = list(inspect.signature(function).parameters) == ["input"]
        if not in_one:
            check_signature(function, path, flag=flag, called_as="fn(args, sample, sampling_params)", num_arguments=3)

        async def adapted(sample: Sample, context: GenerateContext) -> Sample | list[Sample]:
            session = current_session()
            call = Call(requests=context.requests)
            CURRENT_CALL.set(call)
            params = sampling_params(
                context.sampling, budget=context.sampling.budget_tokens(sample), seed=_seed(sample, context)
            )
            facade = to_foreign(sample, as_text=self.as_text)
            if in_one:
                state = GenerateState(session.args)
                made = theirs.GenerateFnInput(state=state, sample=facade, sampling_params=params, evaluation=context.evaluating)
                answer = (await call_anyhow(function, made)).samples
            elif loading.takes(function, "evaluation"):
                answer = await call_anyhow(function, session.args, facade, params, evaluation=context.evaluating)
            else:
                answer = await call_anyhow(function, session.args, facade, params)
            return _back(answer, sample, session, call)

        return adapted

    def make_rollout(self, function: Function, path: str) -> Function:
        """Return a `RolloutFunction`."""

        call, own_source = _RolloutCall(function), None

        async def adapted(rollout_id: int, context: RolloutContext) -> Rollout:
            nonlocal own_source
            session = current_session()
            own_source = own_source or DataSource(context, asyncio.get_running_loop(), as_text=self.as_text)
            session.given_source = session.data_source or own_source
            originals: list[tuple[theirs.Sample, Sample]] = []
            session.make_rollout = lambda number: self._built_in(context, number, originals)
            answer = await call(theirs.RolloutFnTrainInput(rollout_id=rollout_id), session, session.given_source)
            output = answer if isinstance(answer, theirs.RolloutFnTrainOutput) else theirs.RolloutFnTrainOutput(samples=answer)
            made_from = {id(facade): ours for facade, ours in originals}
            groups = to_groups(output.samples, tokenizer=session.tokenizer, made_from=made_from)
            metrics = {name: float(value) for name, value in (output.metrics or {}).items() if isinstance(value, int | float)}
            return Rollout(rollout_id=rollout_id, groups=groups, metrics=metrics)

        _check_rollout(function, path, "--rollout-function-path")
        return adapted

    def evaluate(self, function: Function, path: str) -> Function:
        """Return an `EvalFunction`."""

        call = _RolloutCall(function)

        async def adapted(sets: Sequence[EvalSet], run_set: RunSet) -> Mapping[str, float]:
            async def measure() -> theirs.RolloutFnEvalOutput:
                results = [await run_set(one) for one in sets]
                return theirs.RolloutFnEvalOutput(data={result.name: self._eval_data(result) for result in results})

            session = current_session()
            session.evaluate = measure
            answer = await call(theirs.RolloutFnEvalInput(rollout_id=0), session, session.data_source)
            output = answer if isinstance(answer, theirs.RolloutFnEvalOutput) else theirs.RolloutFnEvalOutput(data=answer)
            return _eval_metrics(output, session)

        _check_rollout(function, path, "--eval-function-path")
        return adapted

    def group_filter(self, function: Function, path: str) -> Function:
        """Return a `GroupFilter`."""
        flag = "--dynamic-sampling-filter-path"
        check_signature(function, path, flag=flag, called_as="fn(args, samples)", num_arguments=2)

        def adapted(group: Group) -> FilterResult:
            answer = function(current_session().args, self._group(group))
            keep = getattr(answer, "keep", answer)
            reason = getattr(answer, "reason", None) or "filtered"
            if bool(keep):
                return FilterResult(keep=True)
            fallback = bool(getattr(answer, "keep_when_insufficient", False))
            return FilterResult(keep=False, reason=str(reason), keep_when_insufficient=fallback)

        return adapted

    def buffer_filter(self, function: Function, path: str) -> Function:
        """Return a `BufferFilter`."""
        called_as = "fn(args, rollout_id, buffer, num_samples)"
        check_signature(function, path, flag="--buffer-filter-path", called_as=called_as, num_arguments=4)

        def adapted(groups: Sequence[Group], num_groups: int) -> list[Group]:
            buffer = [(self._group(group), group) for group in groups]
            of_facade = {id(facade): group for facade, group in buffer}
            picked = function(current_session().args, None, [facade for facade, _ in buffer], num_groups)
            return [of_facade[id(facade)] for facade in picked]

        return adapted

    def find_removed(self, function: Function, path: str) -> Function:
        """Return what names the samples that a finished rollout is not trained on."""
        check_signature(function, path, flag="--rollout-sample-filter-path", called_as="fn(args, groups)", num_arguments=2)

        def adapted(groups: Sequence[Group]) -> list[Sample]:
            pairs = [self._pairs(group) for group in groups]
            given = [[facade for facade, _ in group] for group in pairs]
            function(current_session().args, given)
            if [[id(one) for one in group] for group in given] != [[id(one) for one, _ in group] for group in pairs]:
                raise QwenchError(
                    f"--rollout-sample-filter-path {path} must leave its lists as they are; set remove_sample of what is not "
                    "trained on."
                )
            return [sample for group in pairs for facade, sample in group if facade.remove_sample]

        return adapted

    def on_all_groups(self, function: Function, path: str) -> Function:
        """Return an `AllGroupsHook`."""
        flag, called_as = "--rollout-all-samples-process-path", "fn(args, groups, get_samples)"
        check_signature(function, path, flag=flag, called_as=called_as, num_arguments=3)

        def adapted(groups: Sequence[Group]) -> None:
            session = current_session()
            get_samples = getattr(session.data_source, "get_samples", None)
            function(session.args, [self._group(group) for group in groups], get_samples)

        return adapted

    def with_hooks(self, generate: GenerateFunction, hooks: Sequence[tuple[Function, str]]) -> GenerateFunction:
        """Return a generate function whose samples pass through hooks before their reward."""
        for hook, path in hooks:
            check_signature(hook, path, flag="--rollout-sample-hook-path", called_as="fn(args, sample)", num_arguments=2)

        async def adapted(sample: Sample, context: GenerateContext) -> Sample | list[Sample]:
            session = current_session()
            made = await generate(sample, context)
            passed = []
            for one in made if isinstance(made, list) else [made]:
                facade = to_foreign(one, as_text=self.as_text)
                for hook, _ in hooks:
                    keywords = {"rollout_id": context.rollout_id, "evaluation": context.evaluating}
                    taken = {name: value for name, value in keywords.items() if loading.takes(hook, name)}
                    facade = await call_anyhow(hook, session.args, facade, **taken) or facade
                passed.append(_one_back(facade, one, session, max(one.weight_versions, default=-1)))
            return passed if isinstance(made, list) else passed[0]

        return adapted

    def log_rollout(self, function: Function, path: str) -> LogRollout:
        """Return a `LogRollout`."""
        called_as = "fn(rollout_id, args, samples, rollout_extra_metrics, rollout_time)"
        check_signature(function, path, flag="--custom-rollout-log-function-path", called_as=called_as, num_arguments=5)

        def adapted(rollout_id: int, groups: Sequence[Group], metrics: Mapping[str, float], seconds: float) -> bool:
            samples = [facade for group in groups for facade in self._group(group)]
            return bool(function(rollout_id, current_session().args, samples, dict(metrics), seconds))

        return adapted

    def log_evaluation(self, function: Function, path: str) -> LogEvaluation:
        """Return a `LogEvaluation`."""
        flag, called_as = "--custom-eval-rollout-log-function-path", "fn(rollout_id, args, data, extra_metrics)"
        check_signature(function, path, flag=flag, called_as=called_as, num_arguments=4)

        def adapted(results: Sequence[EvalResult], metrics: Mapping[str, float]) -> bool:
            data = {result.name: self._eval_data(result) for result in results}
            return bool(function(0, current_session().args, data, dict(metrics)))

        return adapted

    def _eval_data(self, result: EvalResult) -> dict[str, Foreign]:
        samples = [to_foreign(sample, as_text=self.as_text) for sample in result.samples]
        truncated = [sample.status is theirs.SampleStatus.TRUNCATED for sample in samples]
        return {"rewards": [sample.reward for sample in samples], "truncated": truncated, "samples": samples}

    def reward_post_process(self, function: Function, path: str, args: Callable[[], Foreign]) -> Function:
        """Return what turns samples into rewards; the second of the two lists is learned from.

        Args:
            args: returns the namespace: it may run on a rank, where there is no session.
        """
        flag = "--custom-reward-post-process-path"
        check_signature(function, path, flag=flag, called_as="fn(args, samples)", num_arguments=2)

        def adapted(samples: Sequence[Sample]) -> Sequence[float]:
            answer = function(args(), [to_foreign(sample, as_text=self.as_text) for sample in samples])
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise QwenchError(f"{flag} {path} must return raw rewards and rewards, got {answer!r:.200}.")
            return [float(reward) for reward in answer[1]]

        return adapted

    async def _built_in(
        self, context: RolloutContext, rollout_id: int, originals: list[tuple[theirs.Sample, Sample]]
    ) -> theirs.RolloutFnTrainOutput:
        """Return the built-in rollout in their form; `originals` gets what each sample was made from."""
        rollout = await context.collect(rollout_id)
        groups = [self._pairs(group) for group in rollout.groups]
        originals += [pair for group in groups for pair in group]
        samples = [[facade for facade, _ in group] for group in groups]
        return theirs.RolloutFnTrainOutput(samples=samples, metrics=dict(rollout.metrics))

    def _group(self, group: Group) -> list[theirs.Sample]:
        return [facade for facade, _ in self._pairs(group)]

    def _pairs(self, group: Group) -> list[tuple[theirs.Sample, Sample]]:
        return [(to_foreign(sample, as_text=self.as_text), sample) for sample in group.samples]


class DataSource:
    """What a rollout function takes prompts from; its methods may be called from any thread but the engines'."""

    def __init__(self, context: RolloutContext, loop: asyncio.AbstractEventLoop, *, as_text: bool) -> None:
        self._context, self._loop, self._as_text = context, loop, as_text
        self.metadata: dict[str, Foreign] = {}

    def get_samples(self, num_samples: int) -> list[list[theirs.Sample]]:
        """Return groups of pending samples."""

        async def take() -> list[Group]:
            return self._context.next_groups(num_samples)

        groups = asyncio.run_coroutine_threadsafe(take(), self._loop).result()
        return [[to_foreign(sample, as_text=self._as_text) for sample in group.samples] for group in groups]

    def add_samples(self, groups: list[list[theirs.Sample]]) -> None:
        """Keep groups for a later rollout."""

        async def put() -> None:
            self._context.put_back(to_groups(groups, tokenizer=self._context.tokenizer))

        asyncio.run_coroutine_threadsafe(put(), self._loop).result()

    def get_buffer_length(self) -> int:
        """Return how many groups wait."""
        return len(self._context.buffer.waiting)

    def update_metadata(self, metadata: Mapping[str, Foreign]) -> None:
        """Keep what a function wants to find again."""
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Foreign]:
        """Return what was kept."""
        return self.metadata


class _RolloutCall:
    """Calls a rollout function in a thread, where it may run coroutines. A class is made once and keeps its state."""

    def __init__(self, named: Foreign) -> None:
        self._named = named
        self._instance: Foreign = None

    async def __call__(self, made: Foreign, session: Session, source: Foreign) -> Foreign:
        """Call it with the input of miles' classes, or with what that input and the session hold."""
        if not inspect.isclass(self._named):
            return await call_anyhow(self._named, session.args, made.rollout_id, source, evaluation=made.evaluation)
        if self._instance is None:
            self._instance = _made(self._named, theirs.RolloutFnConstructorInput(args=session.args, data_source=source))
        return await call_anyhow(self._instance, made)


def _back(answer: Foreign, sample: Sample, session: Session, call: Call) -> Sample | list[Sample]:
    """Return our records of what a generate function returned."""
    version = min(call.versions, default=-1)
    made = [_one_back(one, sample, session, version) for one in leaves(answer)]
    return made[0] if len(made) == 1 else made


def _one_back(facade: theirs.Sample, sample: Sample, session: Session, version: int) -> Sample:
    flag = session.needs_log_probs
    if flag is not None and facade.response_length and facade.rollout_log_probs is None:
        raise QwenchError(f"--custom-generate-function-path returned no rollout_log_probs, which {flag} needs.")
    ours = from_foreign(facade, like=sample, tokenizer=session.tokenizer, version=version)
    return replace(ours, sample_id=sample.sample_id, group_id=sample.group_id)


def _made(named: Foreign, *arguments: Foreign) -> Foreign:
    """Return an instance of a class, and a function as it is."""
    make: Function = named
    return make(*arguments) if inspect.isclass(named) else named


def _seed(sample: Sample, context: GenerateContext) -> int | None:
    """Return the seed of the sample's requests."""
    return context.sampling.params(sample, position=context.position, scope=context.scope).seed


def _check_rollout(function: Function, path: str, flag: str) -> None:
    if not inspect.isclass(function):
        called_as = "fn(args, rollout_id, data_source, evaluation=False)"
        check_signature(function, path, flag=flag, called_as=called_as, num_arguments=3)


def _eval_metrics(output: theirs.RolloutFnEvalOutput, session: Session) -> dict[str, float]:
    """Return eval/... of each set, and what the function measured besides."""
    metrics = {f"eval/{name}": float(value) for name, value in (output.metrics or {}).items() if isinstance(value, int | float)}
    key = getattr(session.args, "eval_reward_key", None)
    for name, data in output.data.items():
        rewards = [float(one[key] if isinstance(one, dict) else one) for one in data["rewards"]]
        metrics[f"eval/{name}"] = sum(rewards) / max(len(rewards), 1)
        if "truncated" in data:
            metrics[f"eval/{name}-truncated_ratio"] = sum(map(bool, data["truncated"])) / max(len(data["truncated"]), 1)
    return metrics
