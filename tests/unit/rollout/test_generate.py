import asyncio
import re
from dataclasses import replace

import pytest

from qwench.engines.protocol import FinishReason, GenerateResult, Scoring
from qwench.errors import EngineError
from qwench.rollout.generate import GenerateContext, Requests, generate_single_turn
from qwench.samples import Status
from tests.fakes.engine import CharTokenizer, FakeEngine, log_prob_of
from tests.unit.rollout.scene import sample, sampling_of


def context(engine, **sampling):
    return GenerateContext(
        requests=Requests(engine),
        tokenizer=CharTokenizer(),
        sampling=sampling_of(**{"max_new_tokens": 10, **sampling}),
        rollout_id=0,
        position=0,
    )


def writes(text):
    return FakeEngine(lambda context, request: text)


def test_response_is_the_engines_tokens_log_probs_and_versions():
    engine, written = writes("hi!"), sample("ab")
    engine.version = 5
    asyncio.run(context(engine).generate(written))
    assert written.tokens == [97, 98, 104, 105, 33]
    assert written.response_length == 3
    assert written.loss_mask == [1, 1, 1]
    assert written.rollout_log_probs == [log_prob_of(104), log_prob_of(105), log_prob_of(33)]
    assert written.weight_versions == [5, 5, 5]
    assert (written.response, written.status) == ("hi!", Status.COMPLETED)


def test_reaching_the_length_limit_truncates():
    written = sample("ab")
    asyncio.run(context(writes("x" * 50)).generate(written))
    assert (written.response_length, written.status) == (10, Status.TRUNCATED)


def test_no_budget_truncates_without_a_request():
    engine, written = writes("hi"), sample("ab")
    written.append([1] * 10, log_probs=[0.0] * 10, version=0)
    turn = asyncio.run(context(engine).generate(written))
    assert (turn.token_ids, turn.status, written.status) == ((), Status.TRUNCATED, Status.TRUNCATED)
    assert engine.requests == []


def test_prompt_as_long_as_the_context_truncates_without_a_request():
    engine, written = writes("hi"), sample("abc")
    asyncio.run(context(engine, max_context_len=3).generate(written))
    assert (written.status, engine.requests) == (Status.TRUNCATED, [])


def test_partial_sample_goes_on_from_its_tokens_with_the_rest_of_the_budget():
    engine, written = writes("x" * 50), sample("ab")
    written.append([99, 100], log_probs=[-1.0, -2.0], version=3)
    written.status = Status.ABORTED
    engine.version = 4
    asyncio.run(context(engine).generate(written))
    (request,) = engine.requests
    assert list(request.input_ids) == [97, 98, 99, 100]
    assert request.sampling.max_new_tokens == 8
    assert written.response == "cd" + "x" * 8
    assert written.rollout_log_probs == [-1.0, -2.0] + [log_prob_of(120)] * 8
    assert written.weight_versions == [3, 3] + [4] * 8


def test_second_turn_sees_the_first_and_the_context_between_is_masked():
    engine = FakeEngine(lambda text, request: "two" if text.endswith(">") else "one<more")
    written, asking = sample("ab"), context(engine, max_new_tokens=30)

    async def talk():
        first = await asking.generate(written, stop=("<",))
        asking.append_context(written, "T>")
        return first, await asking.generate(written)

    first, second = asyncio.run(talk())
    assert (first.text, second.text) == ("one<", "two")
    assert written.response == "one<T>two"
    assert written.loss_mask == [1, 1, 1, 1, 0, 0, 1, 1, 1]
    assert written.weight_versions == [0, 0, 0, 0, -1, -1, 0, 0, 0]
    assert written.rollout_log_probs[4:6] == [0.0, 0.0]
    assert [bytes(request.input_ids).decode() for request in engine.requests] == ["ab", "abone<T>"]


def test_engine_input_and_cached_tokens_add_up_over_turns():
    engine = writes("hi")
    written, asking = sample("abcd"), context(engine)

    async def talk():
        await asking.generate(written)
        await asking.generate(written)

    asyncio.run(talk())
    assert written.input_tokens == 4 + 6
    assert written.cached_tokens == 2 + 3


def test_context_that_does_not_fit_is_cut_and_the_sample_ends_truncated():
    engine = writes("abc")
    written, asking = sample("p"), context(engine)

    async def talk():
        await asking.generate(written)
        asking.append_context(written, "0123456789")
        await asking.generate(written)

    asyncio.run(talk())
    assert (written.response, written.response_length, written.status) == ("abc0123456", 10, Status.TRUNCATED)
    assert len(engine.requests) == 1


def test_response_text_keeps_special_tokens_unless_told_otherwise():
    kept, skipped = sample(), sample()
    asyncio.run(context(writes("a\0b")).generate(kept))
    asyncio.run(context(writes("a\0b"), skip_special_tokens=True).generate(skipped))
    assert (kept.response, skipped.response) == ("a\0b", "ab")
    assert kept.tokens == skipped.tokens == [97, 97, 0, 98]


def test_weights_that_change_within_a_response_are_recorded_token_by_token():
    class Mixed(FakeEngine):
        async def generate(self, request):
            result = await super().generate(request)
            return replace(result, weight_versions=[1, 1, 2], support=[[97], [98, 1], [99]])

    written = sample()
    asyncio.run(context(Mixed(lambda text, request: "abc")).generate(written))
    assert written.weight_versions == [1, 1, 2]
    assert written.support == [[97], [98, 1], [99]]
    assert written.response == "abc"
    assert written.rollout_log_probs == [log_prob_of(97), log_prob_of(98), log_prob_of(99)]


def test_engine_that_returns_too_few_log_probs_is_refused():
    class Short(FakeEngine):
        async def generate(self, request):
            return GenerateResult(
                request_id=request.request_id,
                output_ids=[1, 2],
                log_probs=[0.0],
                finish_reason=FinishReason.STOP,
                weight_versions=[0, 0],
            )

    with pytest.raises(EngineError, match="2 tokens, 1 log-probs and 2 weight versions"):
        asyncio.run(context(Short(lambda text, request: "")).generate(sample()))


def test_abort_keeps_what_was_written():
    engine, written = writes("abcdefgh"), sample("p")
    asking = context(engine)

    async def interrupted():
        task = asyncio.create_task(asking.generate(written))
        for _ in range(4):
            await asyncio.sleep(0)
        await asking.requests.abort_in_flight()
        return await task

    turn = asyncio.run(interrupted())
    assert turn.status is written.status is Status.ABORTED
    assert 0 < written.response_length < 8
    assert "abcdefgh".startswith(written.response)


def test_a_request_of_a_rollout_that_ends_is_answered_under_its_own_id():
    async def asked(requests):
        requests.aborting = True
        sampling = sampling_of().whole
        return [await requests.send([1], sampling) for _ in range(2)]

    answers = asyncio.run(asked(Requests(writes("abc"))))
    prefixes, numbers = zip(*(answer.request_id.split("-") for answer in answers), strict=True)
    assert numbers == ("0", "1") and len(set(prefixes)) == 1 and re.fullmatch("[0-9a-f]{8}", prefixes[0])


@pytest.mark.parametrize("priority", [0, -1])
def test_requests_have_the_priority_of_their_user(priority):
    engine = writes("abc")
    requests, scoring = Requests(engine, **({"priority": priority} if priority else {})), Scoring(start=1)
    asyncio.run(requests.send([1], sampling_of().whole, scoring=scoring))
    assert [(request.priority, request.scoring) for request in engine.requests] == [(priority, scoring)]


def test_a_turn_has_the_bounds_and_stops_that_its_function_names_and_the_seed_of_its_place():
    engine, written = writes("hi"), sample("ab")
    asking = replace(context(engine, stop=("!",), seed_by_position=True), position=2, scope="aime")
    assert (asking.evaluating, context(engine).evaluating) == (True, False)
    named = {"max_new_tokens": 3, "stop": ("<",), "stop_token_ids": (7,)}
    expected = asking.sampling.params(written, position=2, scope="aime", **named)
    asyncio.run(asking.generate(written, **named))
    assert [request.sampling for request in engine.requests] == [expected]
    assert (expected.max_new_tokens, expected.stop, expected.stop_token_ids) == (3, ("!", "<"), (7,))


def test_requests_of_one_user_are_not_ended_by_another():
    engine, mine, other = writes("abc"), sample("m"), sample("o")
    my_context, other_context = context(engine), context(engine)

    async def interrupted():
        tasks = [asyncio.create_task(my_context.generate(mine)), asyncio.create_task(other_context.generate(other))]
        await asyncio.sleep(0)
        await my_context.requests.abort_in_flight()
        await asyncio.gather(*tasks)

    asyncio.run(interrupted())
    assert (mine.status, other.status) == (Status.ABORTED, Status.COMPLETED)


def test_cancelled_generation_ends_its_request_in_the_engine():
    aborted = []

    class Watched(FakeEngine):
        async def abort(self, request_id=None):
            aborted.append(request_id)

    engine = Watched(lambda text, request: "abc", ticks=lambda text, request: None)

    async def cancelled():
        task = asyncio.create_task(context(engine).generate(sample()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancelled())
    assert aborted == [engine.requests[0].request_id]


def test_a_cancelled_generation_is_cancelled_and_no_longer_in_flight():
    engine = FakeEngine(lambda text, request: "abc", ticks=lambda text, request: None)
    one = context(engine)

    async def scenario():
        task = asyncio.create_task(one.generate(sample()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        aborted = []
        engine.abort = lambda name: aborted.append(name) or asyncio.sleep(0)
        await one.requests.abort_in_flight()
        assert aborted == []
        tasks = [asyncio.create_task(one.generate(sample())) for _ in range(6)]
        await asyncio.sleep(0)
        await one.requests.abort_in_flight()
        assert aborted == [request.request_id for request in engine.requests[1:]]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    asyncio.run(scenario())


def test_tokens_that_the_policy_did_not_write_have_no_version():
    written = sample("ab")

    class Strict(CharTokenizer):
        def encode(self, text, *, add_special_tokens):
            assert add_special_tokens is False
            return super().encode(text)

    replace(context(writes("hi")), tokenizer=Strict()).append_context(written, "tool")
    assert (written.weight_versions, written.loss_mask, written.response) == ([-1] * 4, [0] * 4, "tool")


def test_a_single_turn_is_one_request():
    engine, written = writes("hi"), sample("ab")
    assert asyncio.run(generate_single_turn(written, context(engine))) is written
    assert (written.response, len(engine.requests)) == ("hi", 1)
