"""Engines, graders and teachers of a generation: how they are made, shared and closed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from qwench.config.config import Config
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.data.prompts import PromptSource
from qwench.launch import rollouts
from qwench.launch.inputs import Inputs
from qwench.rollout.evaluate import EvalSet
from tests.unit.launch.test_generation import eval_settings
from tests.unit.launch.test_placement import inputs_of

OPD = DistillationConfig(use_opd=True, opd_type="sglang")
"""Of a teacher at --rm-url."""


def config_of(**sections: object) -> Config:
    return Config(**{"rollout": RolloutConfig(rollout_batch_size=4), **sections})


def part(name: str, said: list[object]) -> SimpleNamespace:
    """Return what says when it is closed."""
    return SimpleNamespace(close=lambda: said.append(name))


def generation(inputs: Inputs, said: list[object], **parts: object) -> rollouts.Generation:
    """Return a generation of two engines whose parts say when they are closed."""
    engines = SimpleNamespace(
        engines=["a", "b"], close=lambda: said.append("engines"), run=lambda work, **options: said.append((work, options))
    )
    given = {
        "engines": engines,
        "grader": part("grader", said),
        "eval_grader": part("eval grader", said),
        "functions": SimpleNamespace(rollout="functions", of_sets={}, reward=None),
        "teachers": None,
        "end_session": lambda: said.append("session"),
    }
    return rollouts.Generation(inputs=inputs, **given | parts)


def test_engines_are_closed_after_those_who_use_them() -> None:
    said: list[object] = []
    generation(inputs_of(config_of()), said).close()
    assert said == ["session", "grader", "eval grader", "engines"]
    said.clear()
    teachers = SimpleNamespace(close=lambda: "closing")
    generation(inputs_of(config_of()), said, teachers=teachers, set_graders={"x": part("of x", said)}).close()
    closing = ("closing", {"label": "close the connections to the teachers", "timeout_s": 60.0})
    assert said == ["session", "grader", "eval grader", "of x", closing, "engines"]


@pytest.mark.parametrize(
    ("sections", "apart", "expected"),
    [
        ({}, 0, (2, 14, 14)),
        ({}, 1, (1, 7, 7)),
        ({"evaluation": EvalConfig(eval_low_priority=True)}, 0, (2, 14, 14 // rollouts.SHARE)),
        ({"asynchronous": AsyncConfig(fully_async=True)}, 0, (2, 14, 14)),
        ({"asynchronous": AsyncConfig(fully_async=True, async_max_concurrent_samples=5)}, 0, (2, 5, 14)),
    ],
)
def test_samples_in_flight_are_counted_by_engine(
    sections: dict[str, object], apart: int, expected: tuple[int, int, int]
) -> None:
    inputs = inputs_of(config_of(engine=EngineConfig(sglang_server_concurrency=7), **sections))
    devices = replace(inputs.plan.devices, num_eval_engines=apart)
    made = generation(replace(inputs, plan=replace(inputs.plan, devices=devices)), [])
    assert (made._num_engines, made._training_concurrency, made._eval_concurrency) == expected


def test_an_evaluation_set_has_its_own_grader_and_function() -> None:
    inputs = inputs_of(config_of())
    of_sets = {name: SimpleNamespace(rollout=SimpleNamespace(generate=f"of {name}")) for name in ("x", "y")}
    functions = SimpleNamespace(rollout=None, of_sets=of_sets)
    made = generation(inputs, [], functions=functions, set_graders={"x": "grader of x"})
    one = eval_settings(n_samples_per_eval_prompt=3, custom_generate_function_path="a.b")
    plain = EvalSet(
        name="x", prompts=["p"], n_samples_per_prompt=3, sampling=made._eval_sampling(one), grader="grader of x",
        generate="of x", generate_path="a.b",
    )  # fmt: skip
    assert made._eval_set(one, ["p"]) == plain
    without = replace(plain, name="y", grader=None, generate=None, generate_path=None)
    assert made._eval_set(replace(one, name="y", custom_generate_function_path=None), ["p"]) == without
    unknown = replace(plain, name="z", grader=None, generate=None)
    assert made._eval_set(replace(one, name="z"), ["p"]) == unknown


def test_a_curriculum_of_the_prompts_chooses_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generation(inputs_of(config_of()), [])
    functions = SimpleNamespace(generate=None, buffer_filter=None, log_rollout="log", make_rollout=None)
    made = replace(made, functions=SimpleNamespace(rollout=functions, reward="function"))
    collectors: list[dict[str, object]] = []
    monkeypatch.setattr(
        rollouts, "Collector", lambda *given, **options: collectors.append(options) or SimpleNamespace(collect="collect")
    )
    runners: list[dict[str, object]] = []
    monkeypatch.setattr(
        rollouts, "GroupRunner", lambda *given, **options: runners.append(options) or SimpleNamespace(describe_calls="")
    )
    monkeypatch.setattr(rollouts, "RolloutStream", lambda *given, **options: (given, options))
    source = object.__new__(PromptSource)
    source.curriculum = "curriculum"
    for given in (source, "lines"):
        (_, collect, _, _), options = made.stream(given, num_rollouts=1)
        assert (collect, options["log"]) == ("collect", "log")
    assert [one["curriculum"] for one in collectors] == ["curriculum", None]
    assert [one["grades_executions"] for one in runners] == [True, True]


def test_a_function_of_the_user_gets_what_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "Collector", lambda *given, **options: SimpleNamespace(collect="collect"))
    monkeypatch.setattr(rollouts, "RolloutContext", lambda **options: options)
    monkeypatch.setattr(rollouts, "checked_rollout", lambda *given: given)
    made = generation(inputs_of(config_of()), [])
    expected = {"runner": "runner", "buffer": "buffer", "num_groups": 4, "collect": "collect"}
    functions = SimpleNamespace(make_rollout="function")
    assert made._make_rollout("buffer", "runner", functions, None, None) == ("function", expected)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replace the parts of a generation by their names; return what engines, teachers and the session are made of."""
    made: list[object] = []

    class Functions(SimpleNamespace):
        def grader(self, reward: object) -> object:
            return self.name, reward

    functions = Functions(name="run", of_sets={"own": Functions(name="own")})
    monkeypatch.setattr(rollouts, "load_user_functions", lambda config: functions)
    monkeypatch.setattr(rollouts, "build_pool", lambda inputs, **options: made.append(options) or "engines")
    monkeypatch.setattr(rollouts, "open_user_session", lambda *given, source: (*given[1:], source))

    class Teachers:
        def __init__(self, section: object, urls: object, **options: object) -> None:
            made.append((section, urls, options))

        def check_reachable(self) -> None:
            made.append("reachable")

        def check_tokens(self, tokenizer: object) -> None:
            made.append(tokenizer)

    monkeypatch.setattr(rollouts, "Teachers", Teachers)
    return made


def test_a_generation_is_built_by_the_flags(built: list[object]) -> None:
    inputs = inputs_of(config_of(reward=RewardConfig(rm_type="math")))
    options = {"with_weights": True, "servers": "servers", "token": "secret"}
    made = rollouts.build_generation(inputs, **options, source="source")
    assert built == [options]
    assert (made.inputs, made.engines, made.teachers) == (inputs, "engines", None)
    assert made.grader == ("run", inputs.config.reward) and made.eval_grader is made.grader and made.set_graders == {}
    assert made.end_session == ("engines", rollouts.training_sampling(inputs), made.functions, "source")
    sets = (eval_settings(name="plain"), eval_settings(name="own", custom_rm_path="a.b"))
    other = replace(inputs, plan=replace(inputs.plan, eval_sets=sets, eval_reward_key="score"))
    made = rollouts.build_generation(other, **options)
    assert made.eval_grader == ("run", other.evaluation_reward) != made.grader
    assert made.set_graders == {"own": ("own", replace(other.evaluation_reward, custom_rm_path="a.b"))}
    assert made.end_session[-1] is None


def test_teachers_on_servers_are_checked_before_engines_start(built: list[object]) -> None:
    reward = RewardConfig(rm_url="http://teacher:1")
    timeouts = TimeoutConfig(generate_timeout=9.0)
    cluster = ClusterConfig(rollout_num_gpus=1)
    inputs = inputs_of(config_of(distillation=OPD, reward=reward, cluster=cluster, timeouts=timeouts))
    options = {"with_weights": False, "servers": None, "token": None}
    made = rollouts.build_generation(inputs, **options)
    assert isinstance(made.teachers, rollouts.Teachers)
    urls = OPD.teacher_urls("http://teacher:1")
    assert built == [(OPD, urls, {"generate_timeout_s": 9.0}), "reachable", inputs.tokenizer, options]
    built.clear()
    evaluates = replace(inputs, plan=replace(inputs.plan, devices=replace(inputs.plan.devices, trains=False)))
    assert rollouts.build_generation(evaluates, **options).teachers is None and built == [options]
