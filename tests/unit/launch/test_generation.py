from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from qwench.config.config import Config
from qwench.config.eval_sets import EvalSettings
from qwench.config.plan import plan_run
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.engines.protocol import LOW_PRIORITY, SamplingParams
from qwench.errors import ConfigError
from qwench.launch import rollouts
from qwench.launch.inputs import Inputs
from qwench.launch.rollouts import Generation
from qwench.launch.user_functions import load_user_functions
from qwench.rollout.evaluate_beside import SHARE
from qwench.samples import Rollout
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer, FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.rollout.scene import letters_source, prompt, prompts_of, write_ok

HERE = "tests.unit.launch.test_generation"
SEEN = []
TWO_GPUS = ClusterConfig(actor_num_gpus_per_node=2, rollout_num_gpus_per_engine=2)


async def shout(sample, context):
    await context.generate(sample, max_new_tokens=1)
    context.append_context(sample, "!")
    return sample


async def last_of_three(rollout_id, context):
    groups = context.next_groups(3)
    return Rollout(rollout_id=rollout_id, groups=[await context.run_group(groups[-1], rollout_id=rollout_id)])


async def constant(sets, run_set):
    return {f"eval/{one.name}": 0.5 for one in sets}


def newest_first(groups, num_groups):
    return groups[-num_groups:]


def only_first_sample(sample, group):
    return sample is group.samples[0]


def remember(groups):
    SEEN.append(prompts_of(groups))


@contextmanager
def open_generation(engine, config, *, model_context_len=50, eval_sets=()):
    """Yield the generation of a run around a fake engine."""
    plan = plan_run(config, replace(QWEN3_4B, max_position_embeddings=model_context_len))
    inputs = Inputs(
        config=config, plan=replace(plan, eval_sets=tuple(eval_sets)), model_folder=Path(),
        tokenizer=CharTokenizer(), console=RecordingConsole(),
        hf_config=PretrainedConfig(), device=torch.device("cpu"), dtype=torch.float32,
        rank=0,
    )  # fmt: skip
    grader = FakeGrader(lambda sample: 1.0)
    with closing(EnginePool([engine], EventLoopThread())) as engines:
        yield Generation(
            inputs=inputs,
            engines=engines,
            grader=grader,
            eval_grader=grader,
            functions=load_user_functions(inputs.config),
            teachers=None,
            end_session=lambda: None,
        )


def take(engine=None, *, source=None, model_context_len=50, sections=None, **flags):
    rollout = RolloutConfig(**{"rollout_batch_size": 2, "rollout_max_response_len": 9, **flags})
    config = Config(rollout=rollout, **(sections or {}))
    with (
        open_generation(engine or FakeEngine(write_ok), config, model_context_len=model_context_len) as generation,
        closing(generation.stream(source or letters_source(n=2), num_rollouts=3)) as stream,
    ):
        return stream.take(0)


def evaluate(settings, **evaluation):
    engine = FakeEngine(write_ok)
    config = Config(rollout=RolloutConfig(rollout_batch_size=2), evaluation=EvalConfig(**evaluation))
    with open_generation(engine, config, eval_sets=settings) as generation:
        evaluator = generation.evaluator({one.name: [prompt("abc")] for one in settings})
        return evaluator.evaluate(generation.engines), engine.requests


def eval_settings(**values):
    settings = {
        "name": "x", "path": "", "n_samples_per_eval_prompt": 1, "temperature": 0.0, "top_p": 0.9, "top_k": 5,
        "min_new_tokens": 2, "max_response_len": 20, "max_context_len": None, "max_prompt_len": None,
        "stop": ("</s>",), "stop_token_ids": (7,),
        "input_key": "", "label_key": None, "tool_key": "", "metadata_key": "",
    }  # fmt: skip
    return EvalSettings(**{**settings, **values})


def test_flags_reach_the_requests():
    flags = {
        "rollout_temperature": 0.8,
        "rollout_top_p": 0.7,
        "rollout_top_k": 6,
        "rollout_min_p": 0.1,
        "rollout_min_new_tokens": 1,
        "rollout_stop": ("x",),
        "rollout_stop_token_ids": (7,),
        "rollout_ignore_eos": True,
        "rollout_skip_special_tokens": True,
    }
    engine = FakeEngine(write_ok)
    take(engine, **flags)
    given = {name.removeprefix("rollout_"): value for name, value in flags.items()}
    assert replace(engine.requests[0].sampling, seed=None) == SamplingParams(max_new_tokens=9, keeps_support=True, **given)


def test_model_context_bounds_the_response():
    engine = FakeEngine(write_ok)
    take(engine, rollout_max_context_len=100, model_context_len=5)
    assert engine.requests[0].sampling.max_new_tokens == 4


def test_deterministic_inference_seeds_by_position():
    engine = FakeEngine(write_ok)
    engine_section = EngineConfig(sglang_enable_deterministic_inference=True)
    take(engine, sections={"engine": engine_section, "data": DataConfig(rollout_seed=5)})
    assert [request.sampling.seed for request in engine.requests] == [5, 6, 5, 6]


def test_dynamic_sampling_filter_and_rounds_come_from_flags():
    path = "qwench.rollout.filters.check_reward_nonzero_std"
    rollout = take(dynamic_sampling_filter_path=path, dynamic_sampling_max_rounds=3)
    assert rollout.metrics["rollout/dynamic_filter/drop_zero_std_1.0"] == 6


def test_custom_generate_function_comes_from_its_flag():
    rollout = take(custom_generate_function_path=f"{HERE}.shout")
    assert {sample.response for sample in rollout.samples} == {"o!"}


def test_custom_rollout_function_comes_from_its_flag():
    rollout = take(rollout_function_path=f"{HERE}.last_of_three")
    assert prompts_of(rollout.groups) == "c"
    assert rollout.metrics["rollout/raw_reward"] == 1.0


def test_filters_and_hooks_come_from_their_flags():
    SEEN.clear()
    rollout = take(
        rollout_sample_filter_path=f"{HERE}.only_first_sample",
        rollout_all_samples_process_path=f"{HERE}.remember",
        buffer_filter_path=f"{HERE}.newest_first",
    )
    assert [any(sample.loss_mask) for sample in rollout.samples] == [True, False, True, False]
    assert SEEN == ["ab"]


def test_optional_metrics_come_from_their_flags():
    rollout = take(sections={"logging": LoggingConfig(log_passrate=True)})
    assert rollout.metrics["passrate/pass@2"] == 1.0


@pytest.mark.parametrize(
    "flag",
    [
        "custom_generate_function_path",
        "rollout_function_path",
        "dynamic_sampling_filter_path",
        "buffer_filter_path",
        "rollout_sample_filter_path",
        "rollout_all_samples_process_path",
    ],
)
def test_path_that_cannot_be_imported_names_its_flag(flag):
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} 'nowhere.fn' cannot be imported"):
        take(**{flag: "nowhere.fn"})


def test_an_evaluation_set_is_sampled_by_its_settings():
    config = Config(
        data=DataConfig(rollout_seed=5),
        engine=EngineConfig(sglang_enable_deterministic_inference=True),
        rollout=RolloutConfig(rollout_batch_size=2, rollout_min_p=0.1, rollout_skip_special_tokens=True),
    )
    engine, settings = FakeEngine(write_ok), eval_settings()
    with open_generation(engine, config, eval_sets=[settings]) as generation:
        metrics = generation.evaluator({"x": [prompt("abc")]}).evaluate(generation.engines)
    assert [request.sampling for request in engine.requests] == [
        SamplingParams(
            max_new_tokens=20,
            temperature=0.0,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            min_new_tokens=2,
            stop=("</s>",),
            stop_token_ids=(7,),
            skip_special_tokens=True,
            seed=5,
        )
    ]
    assert metrics["eval/x"] == 1.0


def test_evaluation_without_a_length_goes_to_the_end_of_the_context():
    _, (request,) = evaluate([eval_settings(max_response_len=None, max_context_len=30)])
    assert request.sampling.max_new_tokens == 27


def test_sets_have_their_own_number_of_samples_and_sampling():
    settings = [
        eval_settings(name="a", n_samples_per_eval_prompt=3),
        eval_settings(name="b", max_response_len=4, min_new_tokens=0),
    ]
    _, requests = evaluate(settings)
    assert [request.sampling.max_new_tokens for request in requests] == [20, 20, 20, 4]


def test_custom_evaluation_function_replaces_the_built_in_one():
    metrics, requests = evaluate([eval_settings()], eval_function_path=f"{HERE}.constant")
    assert (metrics, requests) == ({"eval/x": 0.5}, [])


class Recorded:
    """What something was made of."""

    def __init__(self, *given, **options):
        self.given, self.options = given, options
        self.describe_calls, self.collect = "calls", "collect"


def recorded(config, monkeypatch, names, make):
    """Return what `make` makes of the generation of a run, where the types with these names only remember."""
    for name in names:
        monkeypatch.setattr(rollouts, name, Recorded)
    with open_generation(FakeEngine(write_ok), config) as generation:
        made = make(generation)
    return generation, made


STREAM = {"reward": RewardConfig(group_rm=True, allow_degenerate_rewards=True), "timeouts": TimeoutConfig(rollout_timeout=3.0)}


def test_a_stream_is_made_by_the_flags(monkeypatch):
    rollout = RolloutConfig(rollout_batch_size=2, partial_rollout=True, mask_offpolicy_in_partial_rollout=True)
    config = Config(rollout=rollout, cluster=TWO_GPUS, **STREAM)
    names = ("RolloutStream", "GroupBuffer", "GroupRunner", "Collector")
    given = {"num_rollouts": 3, "waiter": "waiter", "observers": ["see"], "early": "early"}
    generation, stream = recorded(config, monkeypatch, names, lambda made: made.stream("source", **given))
    engines, collect, buffer, logging = stream.given
    assert (engines, collect, logging) == (generation.engines, "collect", config.logging)
    assert stream.options == {
        "num_rollouts": 3,
        "early": "early",
        "timeout_s": 3.0,
        "num_gpus": 2,
        "allow_degenerate_rewards": True,
        "observers": ["see"],
        "waiter": "waiter",
        "log": None,
        "describe_calls": "calls",
    }
    assert buffer.given == ("source",)
    assert buffer.options == {
        "max_staleness": generation.inputs.plan.max_staleness,
        "max_age": None,
        "buffer_filter": generation.functions.rollout.buffer_filter,
        "mask_off_policy": True,
    }


def test_a_runner_and_a_collector_are_made_by_the_flags(monkeypatch):
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=2), training=TrainingConfig(deterministic_mode=True),
        engine=EngineConfig(sglang_server_concurrency=6), **STREAM,
    )  # fmt: skip
    generation, runner = recorded(
        config, monkeypatch, ["GroupRunner"], lambda made: made._training_runner(made.functions.rollout)
    )
    assert runner.given == (generation.engines,)
    assert runner.options == {
        "tokenizer": generation.inputs.tokenizer,
        "sampling": rollouts.training_sampling(generation.inputs),
        "grader": generation.grader,
        "concurrency": 6,
        "group_rm": True,
        "generate": generation.functions.rollout.generate,
        "generate_path": None,
        "grades_executions": False,
        "teacher": None,
    }
    kept = []
    monkeypatch.setattr(rollouts, "Collector", lambda *given, **options: kept.append((given, options)) or Recorded())
    generation._make_rollout("buffer", "runner", generation.functions.rollout, "curriculum", "early")
    options = {
        "console": generation.inputs.console, "deterministic": True, "curriculum": "curriculum", "early": "early",
    }  # fmt: skip
    assert kept == [(("runner", "buffer", config.rollout, generation.functions.rollout), options)]


def test_an_evaluator_is_made_by_the_flags(monkeypatch):
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=2), logging=LoggingConfig(log_passrate=True),
        timeouts=TimeoutConfig(eval_timeout=4.0), reward=RewardConfig(group_rm=True),
        engine=EngineConfig(sglang_server_concurrency=3 * SHARE),
    )  # fmt: skip
    generation, evaluator = recorded(config, monkeypatch, ["Evaluator"], lambda made: made.evaluator({}))
    assert evaluator.given == ([],)
    expected = {
        "tokenizer": generation.inputs.tokenizer,
        "grader": generation.eval_grader,
        "concurrency": 3 * SHARE,
        "console": generation.inputs.console,
        "timeout_s": 4.0,
        "group_rm": True,
        "generate": generation.functions.rollout.generate,
        "generate_path": None,
        "function": None,
        "log_passrate": True,
        "log": None,
        "priority": 0,
    }
    assert evaluator.options == expected
    inputs = generation.inputs
    beside = replace(inputs, config=replace(config, evaluation=EvalConfig(eval_low_priority=True)))
    assert replace(generation, inputs=beside).evaluator({}).options == expected | {
        "concurrency": 3,
        "priority": LOW_PRIORITY,
    }


def test_evaluations_beside_training_are_made_by_the_flags(monkeypatch):
    monkeypatch.setattr(rollouts, "EvaluationsBeside", Recorded)
    config = Config(rollout=RolloutConfig(rollout_batch_size=2))
    with open_generation(FakeEngine(write_ok), config) as generation:
        assert generation.evaluations_beside("evaluator", print, None) is None
        for section, waiter, skips in (
            (EvalConfig(eval_low_priority=True, eval_max_in_flight=3, eval_overflow_policy="skip"), "waiter", True),
            (EvalConfig(eval_low_priority=True, eval_max_in_flight=3), None, False),
        ):
            inputs = replace(generation.inputs, config=replace(config, evaluation=section))
            made = replace(generation, inputs=inputs).evaluations_beside("evaluator", print, waiter)
            assert made.given[1:] == (waiter or generation.engines, print)
            assert made.options == {"max_in_flight": 3, "skips": skips}


@pytest.mark.parametrize(("granularity", "in_flight"), [("group", 2), ("sample", None)])
def test_a_continuous_stream_is_made_by_the_flags(granularity, in_flight, monkeypatch):
    section = AsyncConfig(
        fully_async=True, async_max_concurrent_samples=9, rollout_submission_granularity=granularity, max_weight_staleness=2
    )
    rollout = RolloutConfig(rollout_batch_size=2, n_samples_per_prompt=4, dynamic_sampling_max_rounds=5)
    config = Config(rollout=rollout, asynchronous=section, training=TrainingConfig(deterministic_mode=True), **STREAM)
    names = ("ContinuousStream", "GroupBuffer", "GroupRunner", "Selection", "StalenessBound")
    generation, stream = recorded(config, monkeypatch, names, lambda made: made.stream("source", num_rollouts=3))
    engines, runner, selection, buffer, bound, *sections = stream.given
    assert (engines, sections) == (generation.engines, [section, config.logging])
    assert runner.options["concurrency"] == 9
    assert (selection.given, buffer.given) == ((generation.functions.rollout, None), ("source",))
    assert buffer.options == {"max_age": config.max_age}
    assert bound.options == {"groups_per_rollout": 2, "max_staleness": generation.inputs.plan.max_staleness, "num_rollouts": 3}
    assert stream.options == {
        "console": generation.inputs.console,
        "groups_per_rollout": 2,
        "max_groups_in_flight": in_flight,
        "max_rounds": 5,
        "deterministic": True,
        "timeout_s": 3.0,
        "num_gpus": 1,
        "allow_degenerate_rewards": True,
        "observers": (),
        "waiter": None,
        "log": None,
        "describe_calls": "calls",
    }
