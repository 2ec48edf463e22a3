import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import EngineError, QwenchError, RewardError
from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.collect import Collector
from qwench.rollout.filters import FilterResult, check_reward_nonzero_std
from qwench.rollout.functions import RolloutFunctions
from qwench.samples import Status, Verdict
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import FakeEngine
from tests.fakes.grader import FakeGrader
from tests.unit.rollout.scene import by_letter, letters_source, make_collector, make_runner, prompts_of, write_ok

ONE = FakeGrader(lambda sample: 1.0)


def letter(sample):
    return sample.prompt.text[0]


def drop(letters):
    """Return a filter that drops the groups of these prompts."""
    return lambda group: FilterResult(keep=letter(group.samples[0]) not in letters, reason="unwanted")


def collect(engine, *, grader=ONE, rollout_id=0, **options):
    return asyncio.run(make_collector(engine, grader, **options).collect(rollout_id))


def test_rollout_has_the_groups_in_order_of_their_samples_whatever_ends_first():
    engine = FakeEngine(write_ok, ticks=by_letter({"a": 60, "b": 30}))
    rollout = collect(engine, num_groups=3, rollout_id=7)
    assert [reason for reason in engine.events if reason[0] == "stop"] == [("stop", "c"), ("stop", "b"), ("stop", "a")]
    assert (rollout.rollout_id, prompts_of(rollout.groups)) == (7, "abc")


def test_the_buffer_knows_which_groups_are_finished():
    buffer, said = GroupBuffer(letters_source()), []

    async def generate_anew(sample, context):
        made = replace(sample)
        await context.generate(made)
        return made

    def grade(sample):
        said.append((letter(sample), buffer.describe()))
        return 1.0

    engine, grader = FakeEngine(write_ok, ticks=by_letter({"b": 40, "c": 80})), FakeGrader(grade)
    runner = make_runner(engine, grader, generate=generate_anew)
    flags = RolloutConfig(rollout_batch_size=3)
    plain = {"deterministic": False, "curriculum": None}
    collector = Collector(runner, buffer, flags, RolloutFunctions(), console=RecordingConsole(), **plain)
    asyncio.run(collector.collect(0))
    assert said == [
        ("a", "0 of 3 groups finished, samples not finished: 0, 1, 2"),
        ("b", "1 of 3 groups finished, samples not finished: 1, 2"),
        ("c", "2 of 3 groups finished, samples not finished: 2"),
    ]


def test_without_over_sampling_nothing_more_is_submitted():
    buffer = GroupBuffer(letters_source())
    collect(FakeEngine(write_ok), num_groups=3, buffer=buffer)
    assert prompts_of(buffer.next_groups(1)) == "d"


def test_first_groups_to_finish_are_taken_and_the_surplus_is_ended_and_discarded():
    engine = FakeEngine(write_ok, ticks=by_letter({"a": None, "c": None}))
    buffer = GroupBuffer(letters_source())
    rollout = collect(engine, num_groups=2, over_sampling=4, buffer=buffer)
    assert prompts_of(rollout.groups) == "bd"
    assert sorted(event for event in engine.events if event[0] == "abort") == [("abort", "a"), ("abort", "c")]
    assert engine.num_running == 0
    assert (buffer.waiting, prompts_of(buffer.next_groups(1))) == ((), "e")
    assert rollout.metrics["rollout/surplus_groups"] == 2


def test_dropped_groups_are_replaced_by_a_further_submission_and_counted():
    buffer = GroupBuffer(letters_source())
    rollout = collect(FakeEngine(write_ok), num_groups=3, buffer=buffer, group_filter=drop("ac"))
    assert prompts_of(rollout.groups) == "bde"
    assert rollout.metrics["rollout/dynamic_filter/drop_unwanted"] == 2
    assert rollout.metrics["rollout/dynamic_filter/rounds"] == 2
    assert prompts_of(buffer.next_groups(1)) == "g"


def test_a_filter_with_a_fallback_rejects_only_what_others_replace():
    # a to e: of five groups for three, a and b may go; the next rejected one would need another round
    keep_last_two = lambda group: FilterResult(  # noqa: E731
        keep=letter(group.samples[0]) in "de", reason="unwanted", keep_when_insufficient=True
    )
    engine = FakeEngine(write_ok, ticks=by_letter({"a": 10, "b": 20, "c": 30, "d": 40, "e": 50}))
    rollout = collect(engine, num_groups=3, over_sampling=5, group_filter=keep_last_two)
    assert prompts_of(rollout.groups) == "cde"
    assert rollout.metrics["rollout/dynamic_filter/rounds"] == 1
    assert rollout.metrics["rollout/dynamic_filter/drop_unwanted"] == 2


def test_no_further_submission_while_enough_groups_are_in_flight():
    rollout = collect(FakeEngine(write_ok), num_groups=2, over_sampling=5, group_filter=drop("abc"))
    assert prompts_of(rollout.groups) == "de"
    assert rollout.metrics["rollout/dynamic_filter/rounds"] == 1


def test_partial_rollout_keeps_all_surplus_groups_and_uses_them_first():
    waiting = {"b": None, "c": None}
    engine = FakeEngine(write_ok, ticks=lambda text, request: waiting.get(text[0], 0))
    buffer = GroupBuffer(letters_source())
    collector = make_collector(engine, FakeGrader(lambda sample: 1.0), over_sampling=4, partial_rollout=True, buffer=buffer)

    async def twice():
        first = await collector.collect(0)
        kept = [(prompts_of([group]), group.samples[0].status) for group in buffer.waiting]
        waiting.clear()
        return first, kept, await collector.collect(1)

    first, kept, second = asyncio.run(twice())
    assert prompts_of(first.groups) == "ad"
    assert kept == [("b", Status.ABORTED), ("c", Status.ABORTED)]
    starts = [text for event, text in engine.events if event == "start"]
    assert starts == ["a", "b", "c", "d", "b", "c", "e", "f"]
    assert prompts_of(second.groups) == "bc"


def test_partial_rollout_keeps_finished_surplus_groups_with_their_rewards():
    grader = FakeGrader(lambda sample: 1.0)
    buffer = GroupBuffer(letters_source())
    collector = make_collector(FakeEngine(write_ok), grader, num_groups=1, over_sampling=3, partial_rollout=True, buffer=buffer)

    async def twice():
        return [await collector.collect(0), await collector.collect(1)]

    rollouts = asyncio.run(twice())
    assert [prompts_of(rollout.groups) for rollout in rollouts] == ["a", "b"]
    assert grader.graded.count(1) == 1


def test_response_continued_in_the_next_rollout_can_train_on_its_new_tokens_alone():
    engine = FakeEngine(lambda text, request: "x" * {"a": 3, "b": 20}.get(text[0], 60))
    buffer = GroupBuffer(letters_source(), mask_off_policy=True)
    collector = make_collector(
        engine, FakeGrader(lambda sample: 1.0), num_groups=1, over_sampling=2, partial_rollout=True, buffer=buffer
    )

    async def twice():
        await collector.collect(0)
        old = buffer.waiting[0].samples[0].response_length
        engine.version = 1
        return old, await collector.collect(1)

    old, second = asyncio.run(twice())
    (sample,) = second.samples
    new = sample.response_length - old
    assert (letter(sample), old > 0, new > 0) == ("b", True, True)
    assert sample.loss_mask == [0] * old + [1] * new
    assert sample.weight_versions == [-1] * old + [1] * new


def test_filter_that_keeps_nothing_ends_after_its_rounds_with_the_oldest_groups_and_a_warning(caplog):
    grader = FakeGrader(lambda sample: 1.0 if letter(sample) == "b" else 0.0)
    rollout = collect(FakeEngine(write_ok), grader=grader, max_rounds=2, group_filter=check_reward_nonzero_std)
    assert prompts_of(rollout.groups) == "ab"
    assert rollout.metrics["rollout/dynamic_filter/drop_zero_std_0.0"] == 3
    assert rollout.metrics["rollout/dynamic_filter/drop_zero_std_1.0"] == 1
    assert rollout.metrics["rollout/dynamic_filter/all_zero_share"] == 0.75
    assert rollout.metrics["rollout/dynamic_filter/all_one_share"] == 0.25
    (warning,) = caplog.messages
    assert "after 2 rounds the dynamic filter kept only 0 of 2 groups; using 2 rejected ones" in warning
    assert "All rewards 0 in 75% of the groups, all 1 in 25%" in warning


def test_starved_rollout_prefers_the_groups_that_the_filter_kept():
    rollout = collect(FakeEngine(write_ok), num_groups=3, max_rounds=1, group_filter=drop("ab"))
    assert prompts_of(rollout.groups) == "abc"
    rollout = collect(FakeEngine(write_ok), num_groups=2, over_sampling=3, max_rounds=1, group_filter=drop("ab"))
    assert prompts_of(rollout.groups) == "ac"


class AbortsSome(FakeEngine):
    """Ends the requests of some prompts without being asked."""

    def __init__(self, letters):
        super().__init__(write_ok, ticks=by_letter(dict.fromkeys(letters)))
        self._letters = letters

    async def generate(self, request):
        if chr(request.input_ids[0]) in self._letters:
            asyncio.get_running_loop().call_soon(self._end, request.request_id)
        return await super().generate(request)

    def _end(self, request_id):
        self._aborted[request_id].set()


def test_group_that_the_engine_aborted_by_itself_is_replaced():
    rollout = collect(AbortsSome("a"), num_groups=2)
    assert prompts_of(rollout.groups) == "bc"
    assert rollout.metrics["rollout/dynamic_filter/drop_aborted"] == 1


def test_engine_that_aborts_everything_is_an_error_and_not_an_endless_loop():
    with pytest.raises(QwenchError, match="6 groups came back aborted in 3 rounds, so that 2 are missing"):
        collect(AbortsSome("abcdefghijkl"), max_rounds=3)


def test_ungraded_samples_are_taken_out_of_the_loss_and_stay_in_their_group():
    grader = FakeGrader(lambda sample: Verdict(score=1.0, reason="timeout") if letter(sample) == "a" else 1.0)
    rollout = collect(FakeEngine(write_ok), grader=grader)
    assert [(sample.reward, sample.loss_mask) for sample in rollout.samples] == [(0.0, [0, 0]), (1.0, [1, 1])]


def test_sample_filter_masks_and_keeps_the_reward():
    rollout = collect(FakeEngine(write_ok), sample_filter=lambda sample, group: letter(sample) != "b")
    assert [(sample.reward, sample.loss_mask) for sample in rollout.samples] == [(1.0, [1, 1]), (1.0, [0, 0])]


@pytest.mark.parametrize("answer", [None, "no", 0.5, []])
def test_sample_filter_that_decides_nothing_is_refused(answer):
    with pytest.raises(QwenchError, match="--rollout-sample-filter-path must return true or false"):
        collect(FakeEngine(write_ok), sample_filter=lambda sample, group: answer)


def test_hook_sees_every_finished_group_also_dropped_and_surplus_ones():
    seen = []
    engine = FakeEngine(write_ok, ticks=by_letter({"d": None}))
    collect(engine, num_groups=1, over_sampling=4, group_filter=drop("a"), on_all_groups=lambda groups: seen.extend(groups))
    assert prompts_of(seen) == "abc"


def test_failing_reward_ends_the_rollout_and_leaves_nothing_running():
    def fails_on_b(sample):
        if letter(sample) == "b":
            raise RewardError("broken")
        return 1.0

    engine = FakeEngine(write_ok, ticks=by_letter({"a": None, "c": None}))

    async def failing():
        with pytest.raises(RewardError, match="broken"):
            await make_collector(engine, FakeGrader(fails_on_b), num_groups=3).collect(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(failing()) == 1
    assert engine.num_running == 0


def test_failing_engine_ends_the_rollout():
    class Broken(FakeEngine):
        async def generate(self, request):
            raise EngineError("lost")

    with pytest.raises(EngineError, match="lost"):
        collect(Broken(write_ok))


def test_filter_with_another_answer_is_refused():
    with pytest.raises(QwenchError, match="--dynamic-sampling-filter-path must return a FilterResult, got True"):
        collect(FakeEngine(write_ok), group_filter=lambda group: True)


@settings(max_examples=25)
@given(
    engine_ticks=st.lists(st.integers(0, 30), min_size=12, max_size=12),
    grader_ticks=st.lists(st.integers(0, 30), min_size=12, max_size=12),
    partial=st.booleans(),
)
def test_deterministic_rollout_does_not_depend_on_any_timing(engine_ticks, grader_ticks, partial):
    def run(ticks_of_engine, ticks_of_grader):
        buffer = GroupBuffer(letters_source(12))
        engine = FakeEngine(write_ok, ticks=lambda text, request: ticks_of_engine[ord(text[0]) - 97])
        grader = FakeGrader(lambda sample: 1.0, ticks=lambda sample: ticks_of_grader[ord(letter(sample)) - 97])
        rollout = collect(
            engine,
            grader=grader,
            num_groups=2,
            over_sampling=4,
            group_filter=drop("abd"),
            deterministic=True,
            partial_rollout=partial,
            buffer=buffer,
        )
        return rollout, buffer.state_dict()

    rollout, state = run(engine_ticks, grader_ticks)
    assert (rollout, state) == run([0] * 12, [0] * 12)
    assert prompts_of(rollout.groups) == "ce"
    assert [group["group_id"] for group in state["unfinished"]] == ([5, 6, 7] if partial else [])
