"""When a response ends, token by token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.stopping import (
    MAX_STOP_CHARS,
    MAX_STOPS,
    check_stop_strings,
    has_ended,
    stop_ids_of,
    update_finish,
)
from qwench.engines.protocol import FinishReason, GenerateRequest, SamplingParams
from qwench.errors import EngineError
from tests.fakes.engine import CharTokenizer

EOS = ord("$")


def ends_at(prompt: str, response: str, *, max_new_tokens: int = 100, **sampling) -> tuple[int, FinishReason, int | str | None]:
    """Write the response a character at a time; return the length at which it ends, why, and what matched."""
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    running = RunningRequest(
        request=GenerateRequest(request_id="r", input_ids=[*map(ord, prompt)], sampling=params),
        seed=0,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids_of(params, frozenset({EOS})),
        future=None,
        tokens=[*map(ord, prompt)],
        num_prompt=len(prompt),
    )
    for character in response:
        running.tokens.append(ord(character))
        if update_finish(running, CharTokenizer()):
            assert running.finish_reason is not None
            return running.num_output, running.finish_reason, running.matched
    assert running.finish_reason is None and running.matched is None
    return -1, FinishReason.ABORT, None


@pytest.mark.parametrize("stop", ["stop", "op", "pa"])
def test_a_stop_string_in_the_prompt_or_across_its_end_does_not_end_the_response(stop: str):
    assert ends_at("full stop", "abcdefghijkl", stop=(stop,)) == (-1, FinishReason.ABORT, None)
    assert ends_at("full stop", f"abc{stop}", stop=(stop,)) == (3 + len(stop), FinishReason.STOP, stop)


def test_every_stop_string_is_found_however_long_the_others_are():
    assert ends_at("p", "xx the very end", stop=("#", "the very end")) == (15, FinishReason.STOP, "the very end")
    assert ends_at("p", "xx the very#", stop=("#", "the very end")) == (12, FinishReason.STOP, "#")


def test_a_stop_string_of_wide_characters_is_found():
    wide = "\N{GREEK SMALL LETTER ALPHA}" * 5
    assert ends_at("p", f"xxxxxxxx{wide}", stop=(wide,)) == (13, FinishReason.STOP, wide)


def test_of_two_stop_strings_that_end_together_the_first_named_matches():
    assert ends_at("p", "xxab", stop=("b", "ab")) == (4, FinishReason.STOP, "b")
    assert ends_at("p", "xxab", stop=("ab", "b")) == (4, FinishReason.STOP, "ab")


def test_stop_tokens_win_over_stop_strings_and_over_the_length():
    assert ends_at("p", "ab$", stop=("$",)) == (3, FinishReason.STOP, EOS)
    assert ends_at("p", "ab$", max_new_tokens=3) == (3, FinishReason.STOP, EOS)
    assert ends_at("p", "abc$", max_new_tokens=3) == (3, FinishReason.LENGTH, None)
    assert ends_at("p", "ab!", stop_token_ids=(ord("!"),)) == (3, FinishReason.STOP, ord("!"))


def test_nothing_stops_before_the_least_length():
    assert ends_at("p", "$$$$", min_new_tokens=3) == (3, FinishReason.STOP, EOS)
    assert ends_at("p", "xxxx", stop=("x",), min_new_tokens=3) == (3, FinishReason.STOP, "x")
    assert ends_at("p", "$$$$", min_new_tokens=3, max_new_tokens=2) == (2, FinishReason.LENGTH, None)
    assert ends_at("p", "bxcd", stop=("x",), min_new_tokens=4) == (-1, FinishReason.ABORT, None), "it was let pass"


def test_a_request_that_failed_ends_and_a_fault_at_its_end_is_its_failure():
    broken, failed = SimpleNamespace(failure=None), SimpleNamespace(failure=ValueError("before"))
    assert has_ended(broken, None) is has_ended(failed, None) is True
    assert isinstance(broken.failure, AttributeError) and str(failed.failure) == "before"


def test_ignore_eos_disables_all_stop_tokens_and_no_stop_string():
    assert ends_at("p", "$!x", ignore_eos=True, stop_token_ids=(ord("!"),), stop=("x",)) == (3, FinishReason.STOP, "x")


def test_stop_strings_need_a_tokenizer_and_a_character():
    check_stop_strings(SamplingParams(max_new_tokens=1), None)
    check_stop_strings(SamplingParams(max_new_tokens=1, stop=("x",)), CharTokenizer())
    with pytest.raises(EngineError, match="need a tokenizer"):
        check_stop_strings(SamplingParams(max_new_tokens=1, stop=("x",)), None)
    with pytest.raises(EngineError, match="an empty stop string"):
        check_stop_strings(SamplingParams(max_new_tokens=1, stop=("x", "")), CharTokenizer())


def test_stop_strings_are_bounded_in_number_and_length():
    check_stop_strings(SamplingParams(max_new_tokens=1, stop=("x",) * MAX_STOPS), CharTokenizer())
    check_stop_strings(SamplingParams(max_new_tokens=1, stop=("x" * (MAX_STOP_CHARS - 1), "y")), CharTokenizer())
    for stop in (("x",) * (MAX_STOPS + 1), ("x" * MAX_STOP_CHARS, "y")):
        with pytest.raises(EngineError, match=f"at most {MAX_STOPS}, of {MAX_STOP_CHARS} characters together"):
            check_stop_strings(SamplingParams(max_new_tokens=1, stop=stop), CharTokenizer())


def test_half_of_a_surrogate_pair_is_no_stop_string():
    with pytest.raises(EngineError, match="stop string holds half of a surrogate pair at character 1"):
        check_stop_strings(SamplingParams(max_new_tokens=1, stop=("a\ud800",)), CharTokenizer())
