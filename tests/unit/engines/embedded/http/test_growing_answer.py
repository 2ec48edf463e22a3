"""Which text of a response is certain while its tokens arrive."""

from __future__ import annotations

import pytest

from qwench.engines.embedded.http.growing_answer import GrowingText
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
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(stop, expected):
    assert growth("abcxc", stop=stop) == expected


def test_without_a_tokenizer_there_is_no_text():
    assert GrowingText(None, skip_special_tokens=True).certain([1, 2]) == ""


def test_many_tokens_at_once_are_the_same_text():
    ids = TOKENIZER("1 + 2 = \u20ac3\n\n")["input_ids"]
    assert GrowingText(TOKENIZER, skip_special_tokens=True).certain(ids) == "1 + 2 = \u20ac3\n\n"


def test_the_longest_beginning_of_a_stop_string_counts():
    assert growth("xaab", stop=("abc",)) == ["x", "x", "xa", "xa"]  # the second a may begin it, the first does not
    assert growth("abab", stop=("ababc",)) == ["", "", "", ""]
