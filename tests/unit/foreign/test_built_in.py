"""Functions that extend the built-in rollout and evaluation get samples of their form, and lose nothing of ours."""

import asyncio
from argparse import Namespace

import pytest

from qwench.errors import QwenchError
from qwench.foreign.built_in import InferenceRolloutFn, generate_rollout
from qwench.foreign.rollout_functions import Adapters
from qwench.foreign.sample import RolloutFnEvalOutput
from qwench.foreign.session import Session, close_session, current_session, open_session
from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.evaluate import EvalResult
from qwench.rollout.functions import RolloutContext
from qwench.samples import Group, Verdict
from tests.fakes.engine import CharTokenizer, FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.rewards.samples import finished
from tests.unit.rollout.scene import letters_source, make_collector, make_runner, prompts_of, sampling_of, write_ok

ARGS = Namespace(sglang_server_concurrency=4, rollout_num_engines=1)
VERDICTS = FakeGrader(lambda sample: Verdict(score=0.5, reason="half"))


@pytest.fixture
def session():
    def begin(loop):
        opened = Session(
            args=ARGS,
            tokenizer=CharTokenizer(),
            gateway=None,
            loop=loop,
            sampling=sampling_of(max_new_tokens=8),
            grader=VERDICTS,
        )
        open_session(opened)

    yield begin
    close_session()


def context():
    engine, buffer = FakeEngine(write_ok), GroupBuffer(letters_source(n=2))
    collect = make_collector(engine, VERDICTS, num_groups=2, buffer=buffer).collect
    return RolloutContext(runner=make_runner(engine, VERDICTS), buffer=buffer, num_groups=2, collect=collect)


class SecondHalf(InferenceRolloutFn):
    async def _call_train(self, input):  # noqa: A002  # the name tells the form
        output = await super()._call_train(input)
        output.samples[1][1].reward = 0.75
        output.metrics["mine"] = 2.0
        return output


def halves(args, rollout_id, data_source, evaluation=False):
    return generate_rollout(args, rollout_id, data_source, evaluation=evaluation)


@pytest.mark.parametrize("function", [SecondHalf, halves])
def test_samples_that_a_function_leaves_are_ours_as_they_were(session, function):
    async def roll():
        session(asyncio.get_running_loop())
        return await Adapters(as_text=True).make_rollout(function, "mine")(6, context())

    rollout = asyncio.run(roll())
    assert (rollout.rollout_id, prompts_of(rollout.groups)) == (6, "ab")
    samples = [sample for group in rollout.groups for sample in group.samples]
    assert [(sample.sample_id, sample.group_id) for sample in samples] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    changed = function is SecondHalf
    assert [sample.reward for sample in samples] == [0.5, 0.5, 0.5, 0.75 if changed else 0.5]
    assert [sample.verdict.reason for sample in samples] == ["half", "half", "half", "custom" if changed else "half"]
    assert all(len(sample.weight_versions) == sample.response_length == 2 for sample in samples)
    assert rollout.metrics["rollout/surplus_groups"] == 0.0
    assert ("mine" in rollout.metrics) is changed


def doubled(output):
    assert isinstance(output, RolloutFnEvalOutput)
    output.data["easy"]["rewards"] = [reward * 2 for reward in output.data["easy"]["rewards"]]
    return output


def doubles(args, rollout_id, data_source, evaluation=False):
    return doubled(generate_rollout(args, rollout_id, data_source, evaluation=True))


class Doubles(InferenceRolloutFn):
    async def _call_eval(self, input):  # noqa: A002  # the name tells the form
        return doubled(await super()._call_eval(input))


@pytest.mark.parametrize("function", [Doubles, doubles])
def test_the_built_in_evaluation_answers_all_sets(session, function):
    async def run_set(name):
        samples = [finished("1", "1"), finished("2", "1")]
        samples[0].reward, samples[1].reward = 1.0, 0.0
        return EvalResult(name=name, groups=[Group(group_id=0, samples=samples)])

    async def measure():
        session(asyncio.get_running_loop())
        return await Adapters(as_text=True).evaluate(function, "mine")(["easy", "hard"], run_set)

    metrics = asyncio.run(measure())
    assert (metrics["eval/easy"], metrics["eval/hard"]) == (1.0, 0.5)


def test_other_prompts_than_the_runs_are_refused(session):
    def wrong(args, rollout_id, data_source, evaluation=False):
        return generate_rollout(args, rollout_id, object(), evaluation=evaluation)

    async def roll():
        session(asyncio.get_running_loop())
        return await Adapters(as_text=True).make_rollout(wrong, "mine")(0, context())

    with pytest.raises(QwenchError, match="the built-in rollout takes prompts from the run"):
        asyncio.run(roll())


@pytest.mark.parametrize(("evaluating", "flag"), [(False, "--rollout-function-path"), (True, "--eval-function-path")])
def test_outside_of_a_rollout_function_there_is_none(session, evaluating, flag):
    async def call():
        session(asyncio.get_running_loop())
        assert current_session().make_rollout is None
        await asyncio.to_thread(generate_rollout, ARGS, 0, None, evaluating)

    with pytest.raises(QwenchError, match=f"is there for functions of {flag}"):
        asyncio.run(call())
