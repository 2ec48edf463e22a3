import asyncio
import json
from contextlib import closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import EngineError, Stopped, TrainingError
from qwench.rollout import stream as stream_module
from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.early_scores import EarlyScores
from qwench.rollout.filters import FilterResult
from qwench.rollout.stream import RolloutStream
from tests.deadlines import patient
from tests.fakes.engine import FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.rollout.scene import group, letters_source, make_collector, prompts_of, write_ok


def plan_of(num_groups, **changes):
    """Return the plan of a run whose reference has micro-batches of one sample."""
    return replace(plan_run(Config(rollout=RolloutConfig(rollout_batch_size=num_groups)), QWEN3_4B), **changes)


class HeldEngine(FakeEngine):
    """Writes no response to prompts that begin with a held letter."""

    def __init__(self, held):
        super().__init__(write_ok)
        self.held = held

    def holds(self, context, written):
        return context[0] in self.held


class Scorer:
    """Scores tokens by their position, and lets the engine go on when these prompts are scored."""

    def __init__(self, engine, until):
        self.scored, self.ended = "", list[str]()
        self.until, self._engine = until, engine

    def __call__(self, samples):
        self.scored += "".join(sample.prompt.text for sample in samples)
        self.ended += [context for event, context in self._engine.events if event == "stop" and context in self._engine.held]
        if set(self.scored) >= set(self.until):
            self._engine.held = ""
        return [[-float(i) for i in range(1, 1 + sample.response_length)] for sample in samples]


@contextmanager
def open_stream(engine, score, *, num_groups=4, timeout_s=None, **rules):
    buffer, early = GroupBuffer(letters_source()), EarlyScores(score, plan_of(num_groups))
    with closing(EnginePool([engine], EventLoopThread())) as engines:
        collector = make_collector(engine, FakeGrader(lambda sample: 1.0), buffer=buffer, num_groups=num_groups, **rules)
        collector._early = early
        settings = {"num_rollouts": 9, "early": early, "timeout_s": timeout_s}
        with closing(RolloutStream(engines, collector.collect, buffer, LoggingConfig(), **settings)) as stream:
            yield stream


def test_finished_groups_are_scored_before_the_last_one_ends():
    engine = HeldEngine("d")
    score = Scorer(engine, until="abc")
    with open_stream(engine, score) as stream:
        rollout = stream.take(0)
        assert prompts_of(rollout.groups) == "abcd"
        assert ("".join(sorted(score.scored)), score.ended) == ("abc", [])
        assert [sample.ref_log_probs for sample in rollout.samples] == [[-1.0, -2.0]] * 3 + [[]]
        engine.held, score.scored, score.until = "h", "", "efg"
        assert prompts_of(stream.take(1).groups) == "efgh"
        assert sorted(score.scored) == ["e", "f", "g"], "each rollout begins with nothing to score"


def test_groups_that_a_filter_drops_are_not_scored():
    engine = HeldEngine("def")
    score = Scorer(engine, until="bc")
    keep = lambda group: FilterResult(keep=group.samples[0].prompt.text != "a", reason="a")  # noqa: E731
    with open_stream(engine, score, num_groups=3, group_filter=keep) as stream:
        assert prompts_of(stream.take(0).groups) == "bcd"
    assert sorted(score.scored) == ["b", "c"]


def test_a_signal_between_two_scores_saves_groups_without_them_and_they_are_scored_again():
    engine = HeldEngine("d")
    score = Scorer(engine, until="nothing")
    with open_stream(engine, score) as stream:

        def attend(coroutine, **wait):
            if set(score.scored) == set("abc"):
                coroutine.close()
                raise Stopped(15)
            return stream._engines.run(coroutine, **wait)

        stream._waiter = SimpleNamespace(attend=attend)
        with pytest.raises(Stopped):
            stream.take(0)
        stream.interrupt(0)
        state = json.loads(json.dumps(stream.state_dict()))
    assert [record["group_id"] for record in state["in_flight"]] == [0, 1, 2, 3]
    assert "-1.0" not in json.dumps(state["in_flight"]) and "ref_log_probs" not in json.dumps(state)
    engine = HeldEngine("d")
    score = Scorer(engine, until="abc")
    with open_stream(engine, score) as stream:
        stream.load_state_dict(state)
        assert prompts_of(stream.take(0).groups) == "abcd"
    assert sorted(score.scored) == ["a", "b", "c"]


def test_a_failing_score_ends_the_rollout():
    def fails(samples):
        raise TrainingError("a rank died")

    engine = HeldEngine("d")
    with open_stream(engine, fails) as stream:
        with pytest.raises(TrainingError, match="a rank died"):
            stream.take(0)
        assert engine.num_running == 0


def test_one_deadline_holds_for_the_rollout_and_its_scores(monkeypatch):
    engine, clock = HeldEngine("d"), [0.0]
    score = Scorer(engine, until="nothing")
    monkeypatch.setattr(stream_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(samples):
        clock[0] = patient(20) - 0.1
        return score(samples)

    monkeypatch.setattr(stream_module, "_LEAST_WAIT_S", 0.1)
    with (
        open_stream(engine, slow, timeout_s=patient(20)) as stream,
        pytest.raises(
            EngineError, match=rf"the rest of rollout 0 \({patient(20):g} s for all of it\) did not end within 0\.1 s"
        ),
    ):
        stream.take(0)


def test_a_rollout_that_ends_while_it_is_scored_is_not_late(monkeypatch):
    engine, clock = HeldEngine("d"), [0.0]
    score = Scorer(engine, until="abc")
    monkeypatch.setattr(stream_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(stream_module, "_LEAST_WAIT_S", patient(20))

    def slow(samples):
        clock[0] += 1000.0
        return score(samples)

    with open_stream(engine, slow, timeout_s=patient(20)) as stream:
        assert prompts_of(stream.take(0).groups) == "abcd"


@pytest.mark.parametrize(
    ("num_groups", "changes", "enough"),
    [
        (8, {}, [1, 2, 3, 4, 5, 6, 7]),
        (16, {}, [2, 4, 6, 8, 10, 12, 14]),  # an eighth of the rollout
        (8, {"micro_batch_size": 3}, [2, 4, 6]),  # groups have two samples
        (8, {"micro_batch_size": 2, "dp_size": 3}, [3, 6]),
        (8, {"score_tokens": 6, "dp_size": 1}, [3, 6]),  # and two tokens, one a sample
        (8, {"score_tokens": 2, "dp_size": 4}, [4]),
        (2, {"micro_batch_size": 4}, []),
    ],
)
def test_groups_are_scored_once_they_fill_the_ranks_and_an_eighth_and_the_last_ones_are_left(num_groups, changes, enough):
    async def scored_after():
        early, counts = EarlyScores(lambda samples: [], plan_of(num_groups, **changes)), []
        made = asyncio.create_task(asyncio.Event().wait())
        early.begin()
        waiting = asyncio.create_task(early.enough_before(made))
        for count in range(1, num_groups + 1):
            early.add(group("a", group_id=count))
            for _ in range(5):
                await asyncio.sleep(0)
            if waiting.done():
                counts.append(count)
                waiting = asyncio.create_task(early.enough_before(made))
        made.cancel()
        assert await waiting == [], "the rollout was made"
        return counts

    assert asyncio.run(scored_after()) == enough
