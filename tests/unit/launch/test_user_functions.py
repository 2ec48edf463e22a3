"""The user's functions in the policy loss, and the session of those of slime's and miles' convention."""

import asyncio
import socket
from argparse import Namespace
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig

from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.agent import AGENT, TOOL_LOOP, AgentConfig
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import ConfigError
from qwench.foreign.data_source import ForeignSource
from qwench.foreign.session import current_session
from qwench.launch import user_functions
from qwench.launch.inputs import Inputs
from qwench.launch.user_functions import load_user_functions, load_user_terms, open_user_session
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer, FakeEngine
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.launch.test_generation import eval_settings
from tests.unit.rollout.scene import sampling_of, write_ok

HERE = "tests.unit.launch.test_user_functions"


def of_logits(args, batch, logits, sum_of_sample_mean):
    return logits.sum(), {}


def of_log_probs(log_probs, entropy, micro_batch):
    return log_probs


def terms(function: str, *, context_parallel: int):
    algorithm = AlgorithmConfig(loss_type="custom_loss", custom_loss_function_path=f"{HERE}.{function}")
    parallel = ParallelConfig(context_parallel_size=context_parallel)
    return load_user_terms(Config(algorithm=algorithm, parallel=parallel), Namespace)


def test_a_loss_of_logits_is_refused_where_ranks_split_sequences():
    assert terms("of_logits", context_parallel=1).takes_logits
    with pytest.raises(
        ConfigError, match=r"--custom-loss-function-path gets logits of whole .* --context-parallel-size splits"
    ):
        terms("of_logits", context_parallel=2)
    assert not terms("of_log_probs", context_parallel=2).takes_logits


async def foreign_reward(args, sample, **kwargs):
    return 1.0


def test_the_address_of_the_engines_answers_until_the_session_ends():
    config = Config(rollout=RolloutConfig(rollout_batch_size=2), reward=RewardConfig(custom_rm_path=f"{HERE}.foreign_reward"))
    inputs = Inputs(
        config=config, plan=plan_run(config, QWEN3_4B), model_folder=Path(), tokenizer=CharTokenizer(),
        console=RecordingConsole(), hf_config=PretrainedConfig(), device=torch.device("cpu"), dtype=torch.float32, rank=0,
    )  # fmt: skip
    with closing(EnginePool([FakeEngine(write_ok)], EventLoopThread())) as engines:
        end = open_user_session(inputs, engines, sampling_of(max_new_tokens=9), load_user_functions(config), source=None)
        address = ("127.0.0.1", current_session().gateway.port)
        socket.create_connection(address).close()
        end()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_the_filter_of_equal_rewards_compares_the_parts_for_gdpo():
    sums = "qwench.rollout.filters.check_reward_nonzero_std"
    for estimator, expected in (("grpo", "check_reward_nonzero_std"), ("gdpo", "check_parts_nonzero_std")):
        config = Config(
            rollout=RolloutConfig(rollout_batch_size=2, dynamic_sampling_filter_path=sums),
            algorithm=AlgorithmConfig(advantage_estimator=estimator),
            reward=RewardConfig(rm_type="math,f1"),
        )
        assert load_user_functions(config).rollout.group_filter.__name__ == expected


def inputs_with(config: Config) -> Inputs:
    return Inputs(
        config=config, plan=plan_run(config, QWEN3_4B), model_folder=Path(), tokenizer=CharTokenizer(),
        console=RecordingConsole(), hf_config=PretrainedConfig(), device=torch.device("cpu"), dtype=torch.float32, rank=0,
    )  # fmt: skip


@pytest.mark.parametrize("agent", [None, f"{HERE}.an_agent"])
def test_a_session_shares_what_the_run_has_and_ends_before_its_address(agent, monkeypatch):
    said = []

    class Gateway:
        port = 5

        def __init__(self, *given, **options):
            said.append((given, options))

        async def open(self):
            said.append("open")

        def close(self):
            return "closing"

    class Engines:
        def run(self, work, **options):
            said.append(options)
            if work == "closing":
                return said.append(work)
            return asyncio.run(work)

    rewards = SimpleNamespace(close=lambda: said.append("grader"))
    monkeypatch.setattr(user_functions, "Gateway", Gateway)
    monkeypatch.setattr(user_functions, "RewardPool", lambda section: said.append(section) or rewards)
    monkeypatch.setattr(user_functions, "open_session", said.append)
    monkeypatch.setattr(user_functions, "close_session", lambda: said.append("session"))
    monkeypatch.setattr(user_functions, "make_args", lambda *given, **options: (given, options))
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=2), reward=RewardConfig(custom_rm_path="a.b"),
        algorithm=AlgorithmConfig(use_tis=True), agent=AgentConfig(custom_agent_function_path=agent),
        timeouts=TimeoutConfig(generate_timeout=7.0),
    )  # fmt: skip
    inputs, engines, sampling = inputs_with(config), Engines(), sampling_of(max_new_tokens=9)
    functions = SimpleNamespace(has_foreign=True)
    data = object.__new__(ForeignSource)
    data.source = "data"
    end = open_user_session(inputs, engines, sampling, functions, source=data)
    served = config.agent.served_at if agent else None
    assert said[0] == ((engines, inputs.tokenizer), {"max_tokens": 40_960, "agents_at": served})
    opened, reward, session = {"label": "open the address of the engines", "timeout_s": 120.0}, *said[3:]
    assert said[1:3] == [opened, "open"] and reward == replace(config.reward, custom_rm_path=None)
    assert session.args == ((config, inputs.plan), {"host": "127.0.0.1", "port": 5})
    assert (session.tokenizer, session.sampling, session.grader) == (inputs.tokenizer, sampling, rewards)
    assert (session.data_source, session.needs_log_probs, session.answer_timeout_s) == ("data", "--use-tis", 7.0)
    assert isinstance(session.gateway, Gateway) and isinstance(session.loop, asyncio.AbstractEventLoop)
    said.clear()
    end()
    assert said == ["session", "grader", {**opened, "label": "close the address of the engines"}, "closing"]
    said.clear()
    open_user_session(inputs, engines, sampling, functions, source="lines")
    assert said[-1].data_source is None
    said.clear()
    open_user_session(inputs, engines, sampling, SimpleNamespace(has_foreign=False), source=None)()
    assert said == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, None),
        ({"use_tis": True}, "--use-tis"),
        ({"use_rollout_logprobs": True}, "--use-rollout-logprobs"),
        ({"get_mismatch_metrics": True}, "--get-mismatch-metrics"),
    ],
)
def test_flags_that_compare_log_probs_are_named(flags, expected):
    assert user_functions._flag_that_needs_log_probs(Config(algorithm=AlgorithmConfig(**flags))) == expected


def loaded(**sections):
    return load_user_functions(Config(**{"rollout": RolloutConfig(rollout_batch_size=2), **sections}))


async def foreign_generate(args, sample, sampling_params):
    return sample


def foreign_rollout(args, rollout_id, data_source, evaluation=False):
    return []


def foreign_filter(args, samples):
    return True


def foreign_buffer(args, rollout_id, buffer, num_samples):
    return []


def foreign_removal(args, samples):
    return None


def foreign_process(args, samples, data_source):
    return None


def foreign_log(rollout_id, args, samples, extra, seconds):
    return True


def foreign_hook(args, sample):
    return None


def foreign_source(args):
    return None


ROLLOUT = {
    "custom_generate_function_path": ("foreign_generate", "generate"),
    "rollout_function_path": ("foreign_rollout", "make_rollout"),
    "dynamic_sampling_filter_path": ("foreign_filter", "group_filter"),
    "buffer_filter_path": ("foreign_buffer", "buffer_filter"),
    "rollout_sample_filter_path": ("foreign_removal", "find_removed"),
    "rollout_all_samples_process_path": ("foreign_process", "on_all_groups"),
    "custom_rollout_log_function_path": ("foreign_log", "log_rollout"),
}


class Named:
    """Adapts a function to its name and path."""

    def __init__(self, *, as_text: bool) -> None:
        self.as_text = as_text

    def with_hooks(self, generate: object, hooks: list[tuple[object, str]]) -> object:
        return [generate, *((function.__name__, path) for function, path in hooks)]

    def __getattr__(self, target: str) -> object:
        return lambda function, path: (target, function.__name__, path, self.as_text)


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("flag", ROLLOUT)
def test_each_function_of_their_convention_is_adapted(flag, as_text, monkeypatch):
    monkeypatch.setattr(user_functions, "Adapters", Named)
    name, target = ROLLOUT[flag]
    path = f"{HERE}.{name}"
    data = DataConfig(apply_chat_template=as_text)
    functions = loaded(rollout=RolloutConfig(rollout_batch_size=2, **{flag: path}), data=data)
    assert getattr(functions.rollout, target) == (target, name, path, as_text)
    # As there, a rollout function evaluates too.
    evaluates = ("evaluate", name, path, as_text) if target == "make_rollout" else None
    assert functions.rollout.evaluate == evaluates
    assert functions.has_foreign and functions.reward is None
    plain = loaded().rollout
    assert all(getattr(functions.rollout, other) == getattr(plain, other) for _, other in ROLLOUT.values() if other != target)


def test_functions_of_evaluations_are_adapted(monkeypatch):
    monkeypatch.setattr(user_functions, "Adapters", Named)
    paths = {"eval_function_path": "foreign_rollout", "custom_eval_rollout_log_function_path": "foreign_log"}
    functions = loaded(evaluation=EvalConfig(**{flag: f"{HERE}.{name}" for flag, name in paths.items()}))
    assert functions.rollout.evaluate == ("evaluate", "foreign_rollout", f"{HERE}.foreign_rollout", False)
    assert functions.rollout.log_evaluation == ("log_evaluation", "foreign_log", f"{HERE}.foreign_log", False)
    assert functions.rollout.make_rollout is None and functions.has_foreign


def test_hooks_change_what_generates(monkeypatch):
    monkeypatch.setattr(user_functions, "Adapters", Named)
    path = f"{HERE}.foreign_hook"
    functions = loaded(rollout=RolloutConfig(rollout_batch_size=2, rollout_sample_hook_path=(path,)))
    assert functions.rollout.generate == [loaded().rollout.generate, ("foreign_hook", path)]
    assert functions.has_foreign


def test_a_session_is_needed_by_functions_of_their_convention_alone(monkeypatch):
    assert not loaded().has_foreign
    with_reward = loaded(reward=RewardConfig(custom_rm_path=f"{HERE}.foreign_reward", reward_key="score"))
    assert with_reward.has_foreign
    assert not loaded(reward=RewardConfig(custom_rm_path=f"{HERE}.own_reward")).has_foreign
    checked = []
    monkeypatch.setattr(user_functions, "check_data_source", checked.append)
    assert loaded(data=DataConfig(data_source_path=f"{HERE}.foreign_source")).has_foreign
    assert checked == [f"{HERE}.foreign_source"]
    pools = []
    monkeypatch.setattr(user_functions, "RewardPool", lambda section, **options: pools.append((section, options)))
    monkeypatch.setenv("QWENCH_JUDGE_KEY", "key")
    section = RewardConfig(reward_key="other")
    with_reward.grader(section)
    loaded().grader(section)
    (_, options), plain = pools
    assert (options["custom"]._key, options["judge_key"]) == ("other", plain[1]["judge_key"])
    assert plain == (section, {"custom": None, "judge_key": options["judge_key"]}) and options["custom"] is not None


def own_reward(sample):
    return 1.0


def test_a_set_has_the_functions_that_it_names(monkeypatch):
    made = []

    def refuse(config):
        raise ConfigError("no such function")

    monkeypatch.setattr(user_functions, "load_user_functions", made.append)
    agent = AgentConfig(generate_max_turns=3, generate_execute_tool_function_path="c.d")
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=2, custom_generate_function_path=TOOL_LOOP), agent=agent,
        reward=RewardConfig(rm_type="math"), evaluation=EvalConfig(eval_interval=1, eval_prompt_data=("a", "b")),
    )  # fmt: skip
    for path, own_agent in ((TOOL_LOOP, agent), (f"{HERE}.foreign_generate", AgentConfig()), (None, agent)):
        one = eval_settings(custom_rm_path=f"{HERE}.own_reward", custom_generate_function_path=path)
        user_functions._load_of_set(config, one)
        rollout = config.rollout if path is None else replace(config.rollout, custom_generate_function_path=path)
        reward = replace(config.reward, custom_rm_path=f"{HERE}.own_reward")
        assert made[-1] == replace(config, reward=reward, rollout=rollout, agent=own_agent, evaluation=EvalConfig())
    user_functions._load_of_set(config, eval_settings(custom_generate_function_path=TOOL_LOOP))
    assert made[-1].reward == config.reward
    monkeypatch.setattr(user_functions, "load_user_functions", refuse)
    with pytest.raises(ConfigError, match=r"^evaluation set x: no such function"):
        user_functions._load_of_set(config, eval_settings(custom_rm_path="nowhere.fn"))


def an_agent(base_url, prompt, request_kwargs, metadata):
    return None


@pytest.mark.parametrize("records", [True, False])
def test_built_in_functions_are_made_by_their_flags(records, monkeypatch):
    template = {"enable_thinking": False}
    monkeypatch.setattr(user_functions.ToolLoop, "load", lambda *given, **options: SimpleNamespace(generate=(given, options)))
    monkeypatch.setattr(user_functions, "load_agent", lambda section: ("agent", section))
    monkeypatch.setattr(user_functions, "AgentRunner", lambda *given, **options: SimpleNamespace(generate=(given, options)))
    gateway = SimpleNamespace(open_session=lambda *given: given, close_session=lambda *given: ("closed", *given))
    monkeypatch.setattr(user_functions, "current_session", lambda: SimpleNamespace(gateway=gateway))

    def made(path):
        return user_functions._built_in_generate(
            Config(
                rollout=RolloutConfig(rollout_batch_size=2, custom_generate_function_path=path),
                data=DataConfig(apply_chat_template_kwargs=template), agent=AgentConfig(generate_max_turns=3),
                debug=DebugConfig(save_debug_trajectory_data="{rollout_id}.json" if records else None),
            )
        )  # fmt: skip

    section, same = AgentConfig(generate_max_turns=3), {"template_kwargs": template, "records": records}
    assert made(TOOL_LOOP) == ((section,), same)
    given, options = made(AGENT)
    assert given == (("agent", section), section)
    assert (options.pop("open_session")("a", "b"), options.pop("close")("a")) == (("a", "b"), ("closed", "a"))
    assert options == same
    assert made(f"{HERE}.foreign_generate") is None and made(None) is None


def own_normalisation(samples):
    return [0.0 for _ in samples]


def foreign_normalisation(args, samples):
    return [], []


def test_rewards_are_normalised_by_the_function_that_a_flag_names(monkeypatch):
    flag, given = "--custom-reward-post-process-path", {}
    monkeypatch.setattr(user_functions, "Adapters", Named)
    monkeypatch.setattr(Named, "reward_post_process", lambda self, *adapted: adapted, raising=False)
    monkeypatch.setattr(user_functions, "guarded", lambda function, **options: given.update(options) or function.__name__)

    def of(name):
        path = None if name is None else f"{HERE}.{name}"
        config = Config(reward=RewardConfig(custom_reward_post_process_path=path))
        return user_functions.load_post_process(config, Namespace)

    assert of(None) is None
    assert of("own_normalisation") == "own_normalisation" and given == {"path": f"{HERE}.own_normalisation", "flag": flag}
    path = f"{HERE}.foreign_normalisation"
    assert of("foreign_normalisation") == ("foreign_normalisation", path, Namespace) and given == {"path": path, "flag": flag}
    monkeypatch.setattr(user_functions, "load_conversion", lambda *made, as_text: (*made, as_text))
    assert of(None) is user_functions.read_rewards, "the user's conversion has normalised them"
    converting = Config(foreign=ForeignConfig(custom_convert_samples_to_train_data_path="a.b"))
    assert user_functions.load_user_conversion(converting, Namespace) == ("a.b", Namespace, False)
    monkeypatch.setattr(user_functions, "load_targets", lambda *made: made)
    targets = ForeignConfig(custom_advantage_function_path="a.b", rollout_data_postprocess_path="c.d")
    assert user_functions.load_target_functions(Config(foreign=targets), Namespace) == ("a.b", "c.d", Namespace)


def test_terms_of_the_loss_are_loaded_by_their_flags(monkeypatch):
    for name in ("load_correction", "load_reduction"):
        monkeypatch.setattr(user_functions, name, lambda *given, **options: (*given, *options.values()))
    algorithm = AlgorithmConfig(
        custom_tis_function_path="a.b", use_tis=True, custom_pg_loss_reducer_function_path="c.d", calculate_per_token_loss=True
    )
    config = Config(algorithm=algorithm, foreign=ForeignConfig(plugin_api="slime"))
    terms = load_user_terms(config, Namespace)
    assert (terms.correct, terms.reduce, terms.loss) == (("a.b", "slime", Namespace), ("c.d", "slime", True), None)
    plain = load_user_terms(Config(), Namespace)
    assert (plain.correct, plain.reduce, plain.loss, plain.takes_logits) == (None, None, None, False)
