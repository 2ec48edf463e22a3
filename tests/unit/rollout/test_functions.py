import asyncio
import re
from dataclasses import replace

import pytest

from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError, QwenchError
from qwench.rollout.buffer import GroupBuffer, oldest_first
from qwench.rollout.functions import RolloutContext, checked_rollout, load_functions
from qwench.rollout.generate import generate_single_turn
from qwench.samples import Group, Rollout, Status
from tests.fakes.engine import FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.rollout.scene import by_letter, letters_source, make_collector, make_runner, prompts_of, write_ok

HERE = "tests.unit.rollout.test_functions"


def context(engine=None, num_groups=2):
    engine, grader, buffer = engine or FakeEngine(write_ok), FakeGrader(lambda sample: 1.0), GroupBuffer(letters_source())
    collect = make_collector(engine, grader, num_groups=num_groups, buffer=buffer).collect
    return RolloutContext(runner=make_runner(engine, grader), buffer=buffer, num_groups=num_groups, collect=collect)


async def first_done(rollout_id, context):
    """Take the first group that finishes and keep the others."""
    tasks = {
        asyncio.create_task(context.run_group(group, rollout_id=rollout_id))
        for group in context.next_groups(context.num_groups)
    }
    done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    context.put_back(await context.abort(rest))
    return Rollout(rollout_id=rollout_id, groups=[task.result() for task in done])


async def named_built_in(rollout_id, context):
    rollout = await context.collect(rollout_id)
    return Rollout(rollout_id=rollout_id, groups=rollout.groups, metrics={**rollout.metrics, "rollout/mine": 1.0})


async def wrong_id(rollout_id, context):
    return Rollout(rollout_id=rollout_id + 1, groups=context.next_groups(1))


async def ungraded(rollout_id, context):
    return Rollout(rollout_id=rollout_id, groups=context.next_groups(1))


async def empty(rollout_id, context):
    return Rollout(rollout_id=rollout_id, groups=[])


def not_async(rollout_id, context):
    return Rollout(rollout_id=rollout_id, groups=[])


async def one_argument(sample):
    return sample


def make(name, of=None):
    return asyncio.run(checked_rollout(load(f"{HERE}.{name}").make_rollout, of or context())(3))


async def my_generate(sample, context):
    return sample


def takes_groups(groups):
    return None


def takes_a_sample(sample, group):
    return True


def takes_a_number(groups, num_groups):
    return groups


async def my_evaluation(sets, run_set):
    return {}


def test_each_flag_names_its_own_function_and_without_it_the_built_in_one_serves():
    built_in = load_functions(RolloutConfig(), EvalConfig())
    assert (built_in.generate, built_in.buffer_filter) == (generate_single_turn, oldest_first)
    for field, flag, name in (
        ("generate", "custom_generate_function_path", "my_generate"),
        ("make_rollout", "rollout_function_path", "named_built_in"),
        ("group_filter", "dynamic_sampling_filter_path", "takes_groups"),
        ("sample_filter", "rollout_sample_filter_path", "takes_a_sample"),
        ("buffer_filter", "buffer_filter_path", "takes_a_number"),
        ("on_all_groups", "rollout_all_samples_process_path", "takes_groups"),
        ("evaluate", "eval_function_path", "my_evaluation"),
    ):
        section = EvalConfig if flag.startswith("eval") else RolloutConfig
        named = {RolloutConfig: RolloutConfig(), EvalConfig: EvalConfig(), section: section(**{flag: f"{HERE}.{name}"})}
        found = load_functions(*named.values())
        function = getattr(found, field)
        assert function.__name__ == name and found == replace(built_in, **{field: function})


async def fails_later(*arguments):
    raise ValueError(len(arguments))


def fails(*arguments):
    raise ValueError(len(arguments))


def none():
    """Take no argument."""


@pytest.mark.parametrize(
    ("flag", "field", "called_as"),
    [
        ("custom-generate-function-path", "generate", "await fn(sample, context)"),
        ("rollout-function-path", "make_rollout", "await fn(rollout_id, context)"),
        ("dynamic-sampling-filter-path", "group_filter", "fn(group)"),
        ("rollout-sample-filter-path", "sample_filter", "fn(sample, group)"),
        ("buffer-filter-path", "buffer_filter", "fn(groups, num_groups)"),
        ("rollout-all-samples-process-path", "on_all_groups", "fn(groups)"),
        ("eval-function-path", "evaluate", "await fn(sets, run_set)"),
    ],
)
def test_a_function_is_refused_and_fails_under_the_name_of_its_flag(flag, field, called_as):
    def loaded(name):
        path = {flag.replace("-", "_"): f"{HERE}.{name}"}
        evaluation = EvalConfig(**path) if field == "evaluate" else EvalConfig()
        return getattr(load_functions(RolloutConfig() if field == "evaluate" else RolloutConfig(**path), evaluation), field)

    with pytest.raises(ConfigError, match=rf"^--{flag} '{HERE}.none' .* but is called as {re.escape(called_as)}"):
        loaded("none")
    is_async, number = called_as.startswith("await"), called_as.count(",") + 1
    with pytest.raises(QwenchError, match=rf"^--{flag} '{HERE}.\w+' failed: ValueError: {number} "):
        answer = loaded("fails_later" if is_async else "fails")(*range(number))
        asyncio.run(answer)


def load(path):
    return load_functions(RolloutConfig(rollout_function_path=path), EvalConfig())


def test_custom_rollout_uses_runner_and_buffer():
    of = context(FakeEngine(write_ok, ticks=by_letter({"a": None})))
    assert (of.tokenizer, of.sampling) == (of.runner.tokenizer, of.runner.sampling) and of.sampling is not None
    rollout = make("first_done", of)
    assert (rollout.rollout_id, prompts_of(rollout.groups), rollout.groups[0].rewards) == (3, "b", [1.0])
    (left,) = of.buffer.waiting
    assert (prompts_of([left]), left.samples[0].status) == ("a", Status.ABORTED)
    assert isinstance(left, Group)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong_id", "must return Rollout 3 with groups"),
        ("empty", "must return Rollout 3 with groups"),
        ("ungraded", "sample 0 of rollout 3 has reward None"),
    ],
)
def test_custom_rollout_that_returns_something_else_is_refused(name, message):
    with pytest.raises(QwenchError, match=f"--rollout-function-path.*{message}"):
        make(name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such.module.fn", "cannot be imported"),
        (f"{HERE}.missing", "has no 'missing'; it defines: "),
        (f"{HERE}.HERE", "is no function but a str"),
        (f"{HERE}.not_async", "is not async; define it with `async def`"),
        (f"{HERE}.one_argument", r"has the signature \(sample\), but is called as await fn\(rollout_id, context\)"),
    ],
)
def test_function_that_cannot_be_used_is_a_config_error_that_names_the_flag(path, message):
    with pytest.raises(ConfigError, match=f"--rollout-function-path .*{message}"):
        load(path)


def test_a_function_may_change_what_the_built_in_rollout_gives():
    rollout = make("named_built_in")
    assert (rollout.rollout_id, prompts_of(rollout.groups)) == (3, "ab")
    assert (rollout.metrics["rollout/mine"], rollout.metrics["rollout/surplus_groups"]) == (1.0, 0.0)
