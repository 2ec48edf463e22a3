from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from qwench.config.config import Config
from qwench.config.eval_sets import EvalSettings
from qwench.config.plan import plan_run
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import ConfigError
from qwench.launch.inputs import Inputs
from qwench.launch.rollouts import Generation
from qwench.launch.user_functions import load_user_functions
from qwench.samples import Rollout
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer, FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.rollout.scene import letters_source, prompt, prompts_of, write_ok

HERE = "tests.unit.launch.test_generation"
SEEN = []


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
    engine = FakeEngine(write_ok)
    take(engine, rollout_temperature=0.8, rollout_stop=("x",), rollout_stop_token_ids=(7,), rollout_min_new_tokens=1)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.stop, sampling.stop_token_ids) == (0.8, ("x",), (7,))
    assert (sampling.max_new_tokens, sampling.min_new_tokens) == (9, 1)


def test_model_context_bounds_the_response():
    engine = FakeEngine(write_ok)
    take(engine, rollout_max_context_len=100, model_context_len=5)
    assert engine.requests[0].sampling.max_new_tokens == 4


def test_deterministic_inference_seeds_by_position():
    engine = FakeEngine(write_ok)
    take(engine, sections={"engine": EngineConfig(sglang_enable_deterministic_inference=True)})
    assert [request.sampling.seed for request in engine.requests] == [42, 43, 42, 43]


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
    metrics, (request,) = evaluate([eval_settings()])
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_new_tokens) == (0.0, 0.9, 5, 2)
    assert (sampling.max_new_tokens, sampling.stop, sampling.stop_token_ids) == (20, ("</s>",), (7,))
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
