"""Which text of a response is certain while its tokens arrive."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qwench.engines.embedded.http.growing_answer import GrowingAnswer, GrowingText
from qwench.engines.protocol import FinishReason, GenerateRequest, GenerateResult, SamplingParams
from qwench.errors import EngineError
from qwench.models.built_tokenizers import build_small_tokenizer

TOKENIZER = build_small_tokenizer()


def growth(text: str, *, stop: tuple[str, ...] = ()) -> list[str]:
    """Return the certain text after each token."""
    ids = TOKENIZER(text)["input_ids"]
    growing = GrowingText(TOKENIZER, skip_special_tokens=True, stop=stop)
    return [growing.certain(ids[: count + 1]) for count in range(len(ids))]


def test_a_character_is_certain_with_its_last_byte():
    assert growth("a\u20acb") == ["a", "a", "a", "a\u20ac", "a\u20acb"]


def test_special_tokens_are_no_text():
    assert growth("a<|im_end|>b") == ["a", "a", "ab"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("cd",), ["a", "ab", "ab", "abcx", "abcx"]),  # c may begin it; x shows that it did not; the last c may again
        (("xcz", "bd"), ["a", "a", "abc", "abc", "abc"]),  # b, then x and xc may begin one of them
        (("y",), ["a", "ab", "abc", "abcx", "abcxc"]),
        (("bc",), ["a", "a", "abc", "abcx", "abcxc"]),  # --min-new-tokens let it pass
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(stop, expected):
    assert growth("abcxc", stop=stop) == expected


def test_an_answer_tells_what_is_new_and_its_end_once() -> None:
    ids = TOKENIZER("abx")["input_ids"]
    request = GenerateRequest(request_id="r", input_ids=[1], sampling=SamplingParams(max_new_tokens=9, stop=("bx",)))
    made = GenerateResult(
        request_id="r", output_ids=ids, log_probs=[-1.0] * 3, finish_reason=FinishReason.STOP, matched="bx",
        weight_versions=[0] * 3, text="abx",
    )  # fmt: skip
    for no_stop_trim, first, second, text in ((False, "a", "a", "a"), (True, "a", "ab", "abx")):
        running = SimpleNamespace(request=request, num_output=0, future=Future())
        running.so_far = lambda running=running: replace(made, output_ids=ids[: running.num_output], text="")
        growing = GrowingAnswer(running, TOKENIZER, no_stop_trim=no_stop_trim)
        assert growing.advance() is None
        for count, so_far in ((1, first), (2, second)):
            running.num_output = count
            assert growing.advance().text == so_far
            assert growing.advance() is None and not growing.ended
        running.future.set_result(made)
        assert growing.advance() == replace(made, text=text) and growing.ended
        assert growing.advance() is None


def test_an_answer_that_failed_raises_its_error_once() -> None:
    request = GenerateRequest(request_id="r", input_ids=[1], sampling=SamplingParams(max_new_tokens=9))
    running = SimpleNamespace(request=request, num_output=0, future=Future())
    growing = GrowingAnswer(running, None, no_stop_trim=False)
    running.future.set_exception(EngineError("no memory"))
    with pytest.raises(EngineError, match="no memory"):
        growing.advance()
    assert growing.ended and growing.advance() is None


def test_without_a_tokenizer_there_is_no_text():
    assert GrowingText(None, skip_special_tokens=True).certain([1, 2]) == ""


def test_a_token_is_decoded_behind_the_one_before_it():
    words = {1: " one", 2: " two", 3: " three"}
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(words[i] for i in ids).lstrip())
    growing = GrowingText(tokenizer, skip_special_tokens=True)
    assert [growing.certain([1, 2, 3][:count]) for count in (1, 2, 3)] == ["one", "one two", "one two three"]


def test_many_tokens_at_once_are_the_same_text():
    ids = TOKENIZER("1 + 2 = \u20ac3\n\n")["input_ids"]
    assert GrowingText(TOKENIZER, skip_special_tokens=True).certain(ids) == "1 + 2 = \u20ac3\n\n"


def test_the_longest_beginning_of_a_stop_string_counts():
    assert growth("xaab", stop=("abc",)) == ["x", "x", "xa", "xa"]  # the second a may begin it, the first does not
    assert growth("abab", stop=("ababc",)) == ["", "", "", ""]
