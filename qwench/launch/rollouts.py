"""Engines, rollouts and evaluation of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qwench.config.eval_sets import EvalSettings
from qwench.data.curriculum import Curriculum
from qwench.data.prompts import PromptSource
from qwench.engines.fleet.pool import CLOSE_TIMEOUT_S, EnginePool, Waiter
from qwench.engines.fleet.servers import Server
from qwench.engines.protocol import LOW_PRIORITY, SamplingParams
from qwench.launch.engines import build_pool
from qwench.launch.inputs import Inputs
from qwench.launch.user_functions import UserFunctions, load_user_functions, open_user_session
from qwench.rewards.pool import RewardPool
from qwench.rollout.buffer import GroupBuffer, GroupSource
from qwench.rollout.collect import Collector
from qwench.rollout.continuous import ContinuousStream
from qwench.rollout.early_scores import EarlyScores
from qwench.rollout.evaluate import EvalSet, Evaluator
from qwench.rollout.evaluate_beside import SHARE, EvaluationsBeside
from qwench.rollout.functions import MakeRollout, RolloutContext, RolloutFunctions, checked_rollout
from qwench.rollout.groups import GroupRunner
from qwench.rollout.sampling import Sampling
from qwench.rollout.selection import Selection
from qwench.rollout.staleness import StalenessBound
from qwench.rollout.stream import RolloutStream, StreamOptions
from qwench.rollout.teacher import Teachers
from qwench.samples import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The engines and graders that rollouts and evaluations share."""

    inputs: Inputs
    engines: EnginePool
    grader: RewardPool
    eval_grader: RewardPool
    """The same one, unless evaluations have another --eval-reward-key or labels that training has not."""
    functions: UserFunctions
    teachers: Teachers | None
    """On servers (--opd-type sglang)."""
    end_session: Callable[[], None]
    set_graders: Mapping[str, RewardPool] = field(default_factory=dict)
    """Of the evaluation sets with a --custom-rm-path of their own."""

    def stream(
        self,
        source: GroupSource,
        *,
        num_rollouts: int,
        waiter: Waiter | None = None,
        observers: Sequence[Callable[[Rollout], object]] = (),
        early: EarlyScores | None = None,
    ) -> RolloutStream | ContinuousStream:
        """Return the stream of training rollouts over `source`.

        Args:
            observers: are given each rollout, to show or to record it.
            early: scores groups of runs in turn while others are generated.

        Raises:
            ConfigError: a function named by import path cannot be loaded or has another signature.
        """
        config = self.inputs.config
        functions = self.functions.rollout
        runner = self._training_runner(functions)
        curriculum = source.curriculum if isinstance(source, PromptSource) else None
        options: StreamOptions = {
            "timeout_s": config.timeouts.rollout_timeout,
            "num_gpus": self._num_engines * config.cluster.rollout_num_gpus_per_engine,
            "allow_degenerate_rewards": config.reward.allow_degenerate_rewards,
            "observers": observers,
            "waiter": waiter,
            "log": functions.log_rollout,
            "describe_calls": runner.describe_calls,
        }
        if config.asynchronous.fully_async:
            return self._continuous_stream(source, runner, num_rollouts, options, curriculum)
        buffer = GroupBuffer(
            source,
            max_staleness=self.inputs.plan.max_staleness,
            max_age=None if config.rollout.partial_rollout else config.max_age,
            buffer_filter=functions.buffer_filter,
            mask_off_policy=config.rollout.mask_offpolicy_in_partial_rollout,
        )
        make = self._make_rollout(buffer, runner, functions, curriculum, early)
        return RolloutStream(self.engines, make, buffer, config.logging, num_rollouts=num_rollouts, early=early, **options)

    def evaluations_beside(
        self, evaluator: Evaluator, log: Callable[[int, Mapping[str, float]], None], waiter: Waiter | None
    ) -> EvaluationsBeside | None:
        """Return what evaluates while the policy is trained. None: training waits for evaluations."""
        section = self.inputs.config.evaluation
        if not section.is_beside:
            return None
        return EvaluationsBeside(
            lambda: self.engines.loop.start(evaluator.measure(self.engines)),
            waiter or self.engines,
            log,
            max_in_flight=section.eval_max_in_flight,
            skips=section.eval_overflow_policy == "skip",
        )

    def evaluator(self, prompts: Mapping[str, Sequence[Prompt]]) -> Evaluator:
        """Return the evaluator of the sets in `prompts`.

        Raises:
            ConfigError: a function named by import path cannot be loaded or has another signature.
        """
        config = self.inputs.config
        functions = self.functions.rollout
        return Evaluator(
            [self._eval_set(one, prompts[one.name]) for one in self.inputs.plan.eval_sets],
            tokenizer=self.inputs.tokenizer,
            grader=self.eval_grader,
            concurrency=self._eval_concurrency,
            console=self.inputs.console,
            timeout_s=config.timeouts.eval_timeout,
            group_rm=config.reward.group_rm,
            generate=functions.generate,
            generate_path=config.rollout.custom_generate_function_path,
            function=functions.evaluate,
            log_passrate=config.logging.log_passrate,
            log=functions.log_evaluation,
            priority=LOW_PRIORITY if config.evaluation.is_beside else 0,
        )

    def close(self) -> None:
        """End graders and engines."""
        self.end_session()
        for grader in (self.grader, self.eval_grader, *self.set_graders.values()):
            grader.close()
        if self.teachers is not None:
            self.engines.run(self.teachers.close(), label="close the connections to the teachers", timeout_s=CLOSE_TIMEOUT_S)
        self.engines.close()

    def _eval_set(self, one: EvalSettings, prompts: Sequence[Prompt]) -> EvalSet:
        own, path = self.functions.of_sets.get(one.name), one.custom_generate_function_path
        return EvalSet(
            name=one.name,
            prompts=prompts,
            n_samples_per_prompt=one.n_samples_per_eval_prompt,
            sampling=self._eval_sampling(one),
            grader=self.set_graders.get(one.name),
            generate=None if own is None or path is None else own.rollout.generate,
            generate_path=path,
        )

    def _make_rollout(
        self,
        buffer: GroupBuffer,
        runner: GroupRunner,
        functions: RolloutFunctions,
        curriculum: Curriculum | None,
        early: EarlyScores | None,
    ) -> MakeRollout:
        """Return what makes a rollout: the user's own function, or the built-in collector."""
        config = self.inputs.config
        assert config.rollout.rollout_batch_size is not None, "config.verb_checks requires --rollout-batch-size"
        collect = Collector(
            runner,
            buffer,
            config.rollout,
            functions,
            console=self.inputs.console,
            deterministic=config.training.deterministic_mode,
            curriculum=curriculum,
            early=early,
        ).collect
        if functions.make_rollout is None:
            return collect
        num_groups = config.rollout.rollout_batch_size
        context = RolloutContext(runner=runner, buffer=buffer, num_groups=num_groups, collect=collect)
        return checked_rollout(functions.make_rollout, context)

    def _continuous_stream(
        self,
        source: GroupSource,
        runner: GroupRunner,
        num_rollouts: int,
        options: StreamOptions,
        curriculum: Curriculum | None,
    ) -> ContinuousStream:
        """Return the stream of --fully-async."""
        config, batch = self.inputs.config, self.inputs.plan.batch
        section, functions, groups_per_rollout = config.asynchronous, self.functions.rollout, batch.rollout_batch_size
        by_group = section.rollout_submission_granularity == "group"
        bound = StalenessBound(
            groups_per_rollout=groups_per_rollout, max_staleness=self.inputs.plan.max_staleness, num_rollouts=num_rollouts
        )
        return ContinuousStream(
            self.engines,
            runner,
            Selection(functions, curriculum),
            GroupBuffer(source, max_age=config.max_age),
            bound,
            section,
            config.logging,
            console=self.inputs.console,
            groups_per_rollout=groups_per_rollout,
            max_groups_in_flight=max(self._training_concurrency // batch.n_samples_per_prompt, 1) if by_group else None,
            max_rounds=config.rollout.dynamic_sampling_max_rounds,
            deterministic=config.training.deterministic_mode,
            **options,
        )

    def _training_runner(self, functions: RolloutFunctions) -> GroupRunner:
        config = self.inputs.config
        return GroupRunner(
            self.engines,
            tokenizer=self.inputs.tokenizer,
            sampling=training_sampling(self.inputs),
            grader=self.grader,
            concurrency=self._training_concurrency,
            group_rm=config.reward.group_rm,
            generate=functions.generate,
            generate_path=config.rollout.custom_generate_function_path,
            grades_executions=self.functions.reward is not None,
            teacher=self.teachers,
        )

    def _eval_sampling(self, settings: EvalSettings) -> Sampling:
        config = self.inputs.config
        context_len = _context_len(self.inputs, settings.max_context_len)
        whole = SamplingParams(
            max_new_tokens=settings.max_response_len or context_len,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=config.rollout.rollout_min_p,
            min_new_tokens=settings.min_new_tokens,
            stop=settings.stop,
            stop_token_ids=settings.stop_token_ids,
            skip_special_tokens=config.rollout.rollout_skip_special_tokens,
            seed=config.data.rollout_seed,
        )
        return _sampling(self.inputs, whole, context_len)

    @property
    def _num_engines(self) -> int:
        """Return how many engines generate rollouts."""
        return len(self.engines.engines) - self.inputs.plan.devices.num_eval_engines

    @property
    def _concurrency(self) -> int:
        """Return how many samples may be in flight at once, over the engines of rollouts."""
        return self.inputs.config.engine.sglang_server_concurrency * self._num_engines

    @property
    def _eval_concurrency(self) -> int:
        """Return the same for evaluations."""
        if apart := self.inputs.plan.devices.num_eval_engines:
            return self.inputs.config.engine.sglang_server_concurrency * apart
        return max(self._concurrency // SHARE, 1) if self.inputs.config.evaluation.is_beside else self._concurrency

    @property
    def _training_concurrency(self) -> int:
        """Return the same for training rollouts."""
        section = self.inputs.config.asynchronous
        limit = section.async_max_concurrent_samples if section.fully_async else None
        return limit or self._concurrency


def training_sampling(inputs: Inputs) -> Sampling:
    """Return how training rollouts are sampled."""
    config = inputs.config
    rollout = config.rollout
    context_len = _context_len(inputs, rollout.rollout_max_context_len)
    whole = SamplingParams(
        max_new_tokens=rollout.rollout_max_response_len or context_len,
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
        min_p=rollout.rollout_min_p,
        min_new_tokens=rollout.rollout_min_new_tokens,
        stop=rollout.rollout_stop,
        stop_token_ids=rollout.rollout_stop_token_ids,
        ignore_eos=rollout.rollout_ignore_eos,
        skip_special_tokens=rollout.rollout_skip_special_tokens,
        keeps_support=rollout.truncation_flag is not None and config.engine.kind != "sglang",
        seed=config.data.rollout_seed,
    )
    return _sampling(inputs, whole, context_len)


def _sampling(inputs: Inputs, whole: SamplingParams, context_len: int) -> Sampling:
    by_position = inputs.config.engine.sglang_enable_deterministic_inference
    return Sampling(whole=whole, max_context_len=context_len, seed_by_position=by_position)


def _context_len(inputs: Inputs, asked: int | None) -> int:
    """Return the asked context length, or the model's where that is shorter."""
    return min(asked or inputs.plan.model.max_positions, inputs.plan.model.max_positions)


def build_generation(
    inputs: Inputs,
    *,
    with_weights: bool,
    servers: Sequence[Server] | None,
    token: str | None,
    source: GroupSource | None = None,
) -> Generation:
    """Make the engines (see `engines.build_pool`) and the graders.

    Args:
        source: of the training prompts; functions of the user are given theirs.
    """
    trained, evaluated = inputs.training_reward, inputs.evaluation_reward
    functions = load_user_functions(inputs.config)
    teachers = _build_teachers(inputs)
    engines = build_pool(inputs, with_weights=with_weights, servers=servers, token=token)
    grader = functions.grader(trained)
    return Generation(
        inputs=inputs,
        engines=engines,
        grader=grader,
        eval_grader=grader if evaluated == trained else functions.grader(evaluated),
        set_graders={
            one.name: functions.of_sets[one.name].grader(inputs.reward_of(one))
            for one in inputs.plan.eval_sets
            if one.custom_rm_path is not None
        },
        functions=functions,
        teachers=teachers,
        end_session=open_user_session(inputs, engines, training_sampling(inputs), functions, source=source),
    )


def _build_teachers(inputs: Inputs) -> Teachers | None:
    """Return the teachers on servers, which must listen and read text as the policy does; None: there are none.

    Raises:
        ConfigError: one cannot be reached, or has another tokenizer.
    """
    section = inputs.config.distillation
    urls = section.teacher_urls(inputs.config.reward.rm_url)
    if not urls or not inputs.plan.devices.trains:
        return None
    teachers = Teachers(section, urls, generate_timeout_s=inputs.config.timeouts.generate_timeout)
    teachers.check_reachable()
    teachers.check_tokens(inputs.tokenizer)
    return teachers
