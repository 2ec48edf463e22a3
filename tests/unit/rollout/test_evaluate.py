import json
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import EngineError, RewardError
from qwench.rollout.evaluate import EvalResult, EvalSet, Evaluator
from qwench.rollout.generate import generate_single_turn
from qwench.samples import Group, Sample, Status, Verdict
from tests.deadlines import patient
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer, FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.rollout.scene import prompt, sampling_of, write_ok


def eval_set(name, letters, *, n=1, **sampling):
    values = sampling_of(**{"max_new_tokens": 5, "temperature": 0.0, **sampling})
    return EvalSet(name=name, prompts=[prompt(letter) for letter in letters], n_samples_per_prompt=n, sampling=values)


def evaluator(sets, grader, **options):
    absent = dict.fromkeys(("timeout_s", "generate_path", "function", "log"))
    plain = {"group_rm": False, "generate": generate_single_turn, "log_passrate": False, "priority": 0}
    settings = {"concurrency": 4, "console": RecordingConsole(), **absent, **plain, **options}
    return Evaluator(sets, tokenizer=CharTokenizer(), grader=grader, **settings)


def run(sets, score, *, engine=None, call="evaluate", **options):
    with closing(EnginePool([engine or FakeEngine(write_ok)], EventLoopThread())) as engines:
        answer = getattr(evaluator(sets, FakeGrader(score), **options), call)(engines)
        return engines.run(answer, label=call, timeout_s=patient(20)) if call == "measure" else answer


@pytest.mark.parametrize("priority", [0, -1])
def test_requests_have_the_priority_of_the_evaluation(priority):
    engine = FakeEngine(write_ok)
    run([eval_set("easy", "ab")], lambda sample: 1.0, engine=engine, priority=priority)
    assert [request.priority for request in engine.requests] == [priority] * 2


def test_score_is_the_plain_mean_and_sets_are_apart():
    metrics = run(
        [eval_set("easy", "ab"), eval_set("hard", "cde", n=2)], lambda sample: 1.0 if sample.prompt.text in "abc" else 0.0
    )
    assert metrics["eval/easy"] == 1.0
    assert metrics["eval/hard"] == pytest.approx(1 / 3)
    assert metrics["eval/hard/response_len/mean"] == 2.0
    assert metrics["eval/hard/reward_reason/wrong"] == pytest.approx(2 / 3)


def test_response_that_could_not_be_graded_counts_as_zero_and_is_reported():
    metrics = run([eval_set("s", "abcd")], lambda s: Verdict(score=1.0, reason="timeout") if s.prompt.text == "a" else 1.0)
    assert (metrics["eval/s"], metrics["eval/s-none_reward_ratio"]) == (0.75, 0.25)


def test_a_response_without_a_reward_counts_as_zero():
    samples = [Sample(prompt=prompt("a"), sample_id=i, group_id=0, reward=reward) for i, reward in enumerate((1.0, None))]
    assert EvalResult(name="s", groups=[Group(group_id=0, samples=samples)]).score == 0.5


def test_truncated_responses_are_reported():
    engine = FakeEngine(lambda text, request: "ok" if text == "a" else "much too long")
    assert run([eval_set("s", "abbb")], lambda sample: 0.0, engine=engine)["eval/s-truncated_ratio"] == 0.75


def test_rewards_that_are_broken_rather_than_low_are_said(caplog):
    run([eval_set("s", "abcd")], lambda sample: Verdict(score=0.0, reason="no_box"))
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("evaluation of s: 4 of 4 responses got no reward for the same reason, 'no_box': no \\boxed{...}")
    assert "raise --eval-max-response-len until responses end" in message
    assert "--allow-degenerate-rewards" not in message, "an evaluation goes on without it"
    caplog.clear()
    run([eval_set("s", "abcd")], lambda sample: 0.0)
    assert not caplog.records, "wrong answers are what a hard set deserves"


def test_pass_rates_only_when_asked_for():
    sets = [eval_set("s", "ab", n=2)]

    def score(sample):
        return float(sample.sample_id == 0)

    assert not any("pass@" in name for name in run(sets, score))
    metrics = run(sets, score, log_passrate=True)
    assert (metrics["eval/s-pass@1"], metrics["eval/s-pass@2"]) == (0.25, 0.5)


def test_requests_carry_the_sets_own_sampling_and_distinct_seeds():
    engine = FakeEngine(write_ok)
    run([eval_set("x", "a", n=2), eval_set("y", "a", temperature=0.7)], lambda sample: 1.0, engine=engine)
    assert [request.sampling.temperature for request in engine.requests] == [0.0, 0.0, 0.7]
    assert len({request.sampling.seed for request in engine.requests}) == 3
    assert {request.sampling.max_new_tokens for request in engine.requests} == {5}


def test_a_function_that_generates_is_told_its_set_and_place():
    seen = []

    async def write(sample, context):
        seen.append((sample.prompt.text, context.rollout_id, context.position, context.scope, context.evaluating))
        return await generate_single_turn(sample, context)

    run([eval_set("x", "a", n=2), replace(eval_set("y", "b"), generate=write)], lambda sample: 1.0, generate=write)
    assert seen == [("a", 0, 0, "eval/x", True), ("a", 0, 1, "eval/x", True), ("b", 0, 0, "eval/y", True)]


def test_bound_on_samples_in_flight_holds():
    engine = FakeEngine(write_ok)
    run([eval_set("s", "abcdef", n=3)], lambda sample: 1.0, engine=engine)
    assert engine.max_running == 4


def test_results_keep_every_sample_for_a_file():
    (result,) = run([eval_set("s", "ab", n=2)], lambda sample: 1.0, call="run")
    read = [Sample.from_record(json.loads(json.dumps(sample.to_record()))) for sample in result.samples]
    assert [(s.prompt.text, s.sample_id, s.response, s.status) for s in read] == [
        ("a", 0, "ok", Status.COMPLETED),
        ("a", 1, "ok", Status.COMPLETED),
        ("b", 2, "ok", Status.COMPLETED),
        ("b", 3, "ok", Status.COMPLETED),
    ]


def test_failing_reward_comes_out():
    def fails(sample):
        raise RewardError("no label")

    with pytest.raises(RewardError, match="no label"):
        run([eval_set("s", "ab")], fails)


@pytest.mark.parametrize("call", ["evaluate", "measure"])
def test_custom_evaluation_runs_sets_and_names_its_own_metrics(call):
    async def worst(sets, run_set):
        return {"eval/worst": min([(await run_set(one)).score for one in sets])}

    sets = [eval_set("x", "a"), eval_set("y", "b")]
    assert run(sets, lambda s: float(s.prompt.text == "a"), function=worst, call=call) == {"eval/worst": 0.0}


def test_an_evaluation_beside_training_has_a_deadline_for_each_set():
    engine = FakeEngine(write_ok, ticks=lambda context, request: None)
    with pytest.raises(EngineError, match=r"^an evaluation beside training took longer than 0\.01 s a set\.$"):
        run([eval_set("x", "a"), eval_set("y", "b")], lambda sample: 1.0, engine=engine, call="measure", timeout_s=0.01)


def test_every_sample_of_a_set_counts_in_its_progress():
    console = RecordingConsole()
    run([eval_set("x", "ab", n=2), eval_set("y", "c")], lambda sample: 1.0, console=console)
    shown = [(bar.description, bar.total, bar.steps) for bar in console.progresses]
    assert shown == [("evaluate x", 2, [1, 1]), ("evaluate y", 1, [1])]


@pytest.mark.parametrize("call", ["evaluate", "run"])
@pytest.mark.parametrize(("own", "named"), [(None, "mine.fn"), ("other.fn", "other.fn")])
def test_a_wait_names_the_function_that_generates(call, own, named):
    waits, said = [], []

    def attend(coroutine, *, label, timeout_s, describe):
        waits.append((label, timeout_s))
        described.append(describe)
        return engines.run(coroutine, label=label, timeout_s=patient(20))

    async def slow(sample, context):
        said.append(described[-1]())
        return await generate_single_turn(sample, context)

    described, one = [], replace(eval_set("x", "a"), generate=own and slow, generate_path=own)
    with closing(EnginePool([FakeEngine(write_ok)], EventLoopThread())) as engines:
        made = evaluator([one], FakeGrader(lambda sample: 1.0), generate=slow, generate_path="mine.fn", timeout_s=7.0)
        getattr(made, call)(engines, SimpleNamespace(attend=attend))
    assert waits == [("evaluation of x", 7.0)] and named in said[0]


@pytest.mark.parametrize("call", ["evaluate", "measure"])
@pytest.mark.parametrize("logged", [True, False])
def test_what_a_function_has_logged_is_not_logged_again(logged, call):
    seen = []

    def log(results, metrics):
        seen.append(([result.name for result in results], metrics))
        return logged

    metrics = run([eval_set("x", "a"), eval_set("y", "b")], lambda sample: 1.0, log=log, call=call)
    [(names, shown)] = seen
    assert names == ["x", "y"] and shown["eval/x"] == shown["eval/y"] == 1.0
    assert metrics == ({} if logged else shown)


def test_samples_have_their_places_in_the_set_and_rows_their_metadata():
    rows = [replace(prompt(letter), metadata={"row": letter}) for letter in "ab"]
    (result,) = run([replace(eval_set("s", "", n=2), prompts=rows)], lambda sample: 1.0, call="run")
    assert [[(one.sample_id, one.group_id, one.metadata) for one in group.samples] for group in result.groups] == [
        [(0, 0, {"row": "a"}), (1, 0, {"row": "a"})],
        [(2, 1, {"row": "b"}), (3, 1, {"row": "b"})],
    ]
    assert [group.group_id for group in result.groups] == [0, 1]
    result.samples[0].metadata["turn"] = 1
    assert result.samples[1].metadata == rows[0].metadata == {"row": "a"}


@pytest.mark.parametrize(("options", "together"), [({}, []), ({"group_rm": True}, [[0, 1], [2, 3]])])
def test_samples_are_graded_alone_unless_groups_are_asked_for(options, together):
    grader = FakeGrader(lambda sample: 1.0)
    with closing(EnginePool([FakeEngine(write_ok)], EventLoopThread())) as engines:
        evaluator([eval_set("s", "ab", n=2)], grader, **options).evaluate(engines)
    assert sorted(grader.group_calls) == together
