"""What a request must satisfy, and the seed it gets."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qwench.engines.embedded.scheduling.admission import QUIET_TURNS, Admission, eos_ids_of
from qwench.engines.protocol import GenerateRequest, SamplingParams, Scoring
from qwench.errors import EngineError
from tests.unit.config.architectures import QWEN3_4B


def admission(seed: int = 0) -> Admission:
    small = replace(QWEN3_4B, vocab_size=10, max_position_embeddings=20)
    return Admission(small, eos_ids=frozenset({9}), tokenizer=None, seed=seed)


def accepted(admission: Admission, *, prompt=(1, 2, 3), room: int = 8, max_new_tokens: int = 4, **fields):
    own = {name: fields.pop(name) for name in ("priority", "scoring") if name in fields}
    params = SamplingParams(max_new_tokens=max_new_tokens, **fields)
    request = GenerateRequest(request_id="r", input_ids=list(prompt), sampling=params, **own)

    async def accept():
        return admission.accept(request, max_request_tokens=room)

    return asyncio.run(accept())


def seeds(engine_seed: int, n: int = 4) -> list[int]:
    one = admission(engine_seed)
    return [accepted(one).seed for _ in range(n)]


def test_requests_without_a_seed_draw_theirs_from_the_engines_seed_and_their_number():
    assert seeds(5) == seeds(5)
    drawn = [*seeds(5), *seeds(6), *seeds(7)]
    assert len(set(drawn)) == 12
    assert all(0 <= seed < 2**53 for seed in drawn) and max(drawn) > 2**40
    assert seeds(5) == seeds(5 + 2**64) and seeds(-1) == seeds(2**64 - 1)


def test_a_request_keeps_its_own_seed():
    assert [accepted(admission(3), seed=seed).seed for seed in (0, 7, 2**64 + 7, -1)] == [0, 7, 7, 2**64 - 1]


def test_a_request_keeps_its_priority():
    assert [accepted(admission(), priority=priority).priority for priority in (0, -1, 5)] == [0, -1, 5]


def test_the_response_is_bounded_by_the_room_behind_the_prompt():
    one = accepted(admission(), room=5, max_new_tokens=4)
    assert (one.tokens, one.num_prompt, one.max_new_tokens, one.stop_ids) == ([1, 2, 3], 3, 2, frozenset({9}))
    assert accepted(admission(), room=7, max_new_tokens=3).max_new_tokens == 3
    assert accepted(admission(), room=4).max_new_tokens == 1


def test_a_prompt_without_room_names_the_limit_that_it_meets():
    with pytest.raises(EngineError, match=r"\(3 tokens\) leaves no room .*: the engine holds 3 tokens; .*-kv-cache-tokens"):
        accepted(admission(), room=3)
    assert accepted(admission(), prompt=range(1, 9), room=20).max_new_tokens == 4
    said = r"\(20 tokens\) leaves no room for a response: the model has 20 positions; shorten the prompt\.$"
    with pytest.raises(EngineError, match=said):
        accepted(admission(), prompt=[1] * 20, room=20)


def test_only_accepted_requests_are_counted():
    one = admission()
    with pytest.raises(EngineError):
        accepted(one, room=1)
    accepted(one)
    accepted(one)
    assert one.num_accepted == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "has max_new_tokens 0; at least 1 is needed"),
        ({"temperature": -0.1}, "has temperature -0.1"),
        ({"temperature": float("nan")}, "has temperature nan"),
        ({"top_p": 0.0}, "has top_p 0.0"),
        ({"top_p": 1.1}, "has top_p 1.1"),
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"min_p": 1.1}, "min_p 1.1"),
        ({"prompt": ()}, "has an empty prompt"),
        ({"prompt": (1, -1)}, r"token ids outside \[0, 10\)"),
        ({"prompt": (10, 1)}, r"token ids outside \[0, 10\)"),
        ({"stop": ("x",)}, "need a tokenizer"),
    ],
)
def test_a_request_that_can_never_run_is_refused(fields: dict, message: str):
    with pytest.raises(EngineError, match=message):
        accepted(admission(), **fields)


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_p": 1.0}, {"min_p": 1.0}, {"min_p": 0.0}, {"prompt": (0, 9)}])
def test_the_ends_of_the_allowed_ranges_are_accepted(fields: dict):
    assert accepted(admission(), max_new_tokens=1, **fields).max_new_tokens == 1


def test_a_request_that_scores_its_prompt_generates_nothing():
    assert accepted(admission(), max_new_tokens=0, scoring=Scoring(start=2)).max_new_tokens == 0
    with pytest.raises(EngineError, match=r"^request 'r' scores its prompt and has max_new_tokens 1; it must be 0"):
        accepted(admission(), max_new_tokens=1, scoring=Scoring(start=2))
    with pytest.raises(EngineError, match=r"^request 'r' scores from token 3 on; it must lie in \[1, 3\)"):
        accepted(admission(), max_new_tokens=0, scoring=Scoring(start=3))
    with pytest.raises(EngineError, match=r"^request 'r' wants log-probs of token ids outside \[0, 10\)"):
        accepted(admission(), max_new_tokens=0, scoring=Scoring(start=1, token_ids=(10,)))


@pytest.mark.parametrize(("inline", "num_arrived", "turns"), [(False, 1, 1), (True, 5, 5 + QUIET_TURNS)])
def test_inline_all_requests_arrive_before_a_batch_is_made(inline, num_arrived, turns):
    one, passed = admission(), []

    async def arrive():
        while len(passed) < 40:
            passed.append(one.num_accepted)
            one.num_accepted += len(passed) <= 5
            await asyncio.sleep(0)

    async def scenario():
        arriving = asyncio.ensure_future(arrive())
        await one.let_requests_arrive(inline=inline)
        arriving.cancel()

    asyncio.run(scenario())
    assert (one.num_accepted, len(passed)) == (num_arrived, turns)


def test_end_of_sequence_ids_come_from_config_and_tokenizer():
    def ids(config, tokenizer=None):
        named = None if tokenizer is None else SimpleNamespace(eos_token_id=tokenizer)
        return eos_ids_of(SimpleNamespace(eos_token_id=config), named)

    assert ids(3) == {3} and ids([3, 4]) == {3, 4} and ids(None) == frozenset()
    assert ids([3, 4], 5) == {3, 4, 5} and ids(None, 0) == {0}


@pytest.mark.parametrize(
    ("kept", "refused"),
    [
        ({"max_new_tokens": 1}, {"max_new_tokens": 0}),
        ({"top_p": 1.0}, {"top_p": 1.01}),
        ({"top_p": 1e-9}, {"top_p": 0.0}),
        ({"min_p": 0.0}, {"min_p": -0.01}),
        ({"min_p": 1.0}, {"min_p": 1.01}),
        ({"top_k": -1}, {"top_k": -2}),
        ({"min_new_tokens": 4}, {"min_new_tokens": 5}),
        ({"min_new_tokens": 0}, {"min_new_tokens": -1}),
        ({"stop_token_ids": (0, 9)}, {"stop_token_ids": (10,)}),
        ({"stop_token_ids": (0,)}, {"stop_token_ids": (-1,)}),
        ({"prompt": (0, 9)}, {"prompt": (0, 10)}),
        ({"prompt": (0,)}, {"prompt": (-1, 0)}),
        ({"priority": 2**31 - 1}, {"priority": 2**31}),
        ({"priority": 1 - 2**31}, {"priority": -(2**31)}),
    ],
)
def test_numbers_are_kept_up_to_their_bounds(kept, refused):
    accepted(admission(), **kept)
    with pytest.raises(EngineError, match="request 'r'"):
        accepted(admission(), **refused)
