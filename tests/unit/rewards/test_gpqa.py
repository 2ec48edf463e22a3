"""Which option a response chooses, and whether it is the right one."""

from __future__ import annotations

import pytest

from qwench.errors import RewardError
from qwench.rewards.gpqa import chosen_letter, grade

LETTERS = ("A", "B", "C", "D")
CHOICES = {"choices": ["10 m", "20 m", "the speed of light", "2"]}

CHOSEN = [
    ("The answer is B", "B"),
    ("the answer is (c).", "C"),
    ("Answer: **D**", "D"),
    ("Final answer: $A$", "A"),
    ("I choose option B, as A is wrong", "B"),
    (r"so \boxed{C}", "C"),
    (r"\boxed{\text{(D)}}", "D"),
    ("B is the correct one", "B"),
    ("The answer is A. Wait: the answer is C.", "C"),
    ("The answer depends on D", "D"),  # `depends` is no D: the letter alone is
    ("The answer is easy", None),
    ("The correct answer is B because the answer is a ketone.", "B"),
    ("Option B is right: the other option is a racemic mixture.", "B"),
    ("The answer is a straightforward application of Gauss's law, so B.", "B"),
    ("The answer is B. Option A, C and D are wrong.", "B"),
    ("The answer is B, not option C.", "B"),
    (r"\boxed{B) 20 °C}", "B"),
    (r"\boxed{b}", "B"),
    (r"\boxed{20 m}, which is option B", "B"),
    ("Perhaps A or B", "B"),
    ("E", None),
    ("I don't know", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "letter"), CHOSEN)
def test_the_last_explicit_choice_counts(text, letter):
    assert chosen_letter(text, LETTERS) == letter


VERDICTS = [
    ("answer: B", "B", {}, 1, "exact"),
    ("answer: B", "C", {}, 0, "wrong"),
    ("answer: J", "j", {}, 1, "exact"),  # ten letters without choices
    ("answer: B", "20 m", CHOICES, 1, "exact"),
    ("It is 20 m.", "20 m", CHOICES, 1, "stated_text"),
    ("It is 20 m.", "B", CHOICES, 1, "stated_text"),
    ("It is 120 m.", "B", CHOICES, 0, "no_choice"),
    ("answer: C", "2", CHOICES, 0, "wrong"),  # the text of a choice comes before its number
    ("answer: D", "2", CHOICES, 1, "exact"),
    ("answer: C", "2", {"choices": ["p", "q", "r"]}, 1, "exact"),  # number 2 from 0 on
    ("answer: Y", "b", {"choices": {"X": "p", "Y": "q"}, "correct_letter": "Y"}, 1, "exact"),
    ("answer: Q", "q", {"valid_letters": ["P", "Q"]}, 1, "exact"),
    ("A</think>the answer is B", "B", {}, 1, "exact"),
    ("the answer is B</think>the answer is A", "B", {}, 0, "wrong"),
    ("the mitochondria", "Mitochondria", {}, 1, "stated_text"),
    ("", "B", {}, 0, "no_choice"),
]


@pytest.mark.parametrize(("response", "label", "metadata", "score", "reason"), VERDICTS)
def test_verdicts(response, label, metadata, score, reason):
    verdict = grade(response, label, metadata)
    assert (verdict.score, verdict.reason) == (score, reason)
    assert verdict.extra == ({"pred": response[-1]} if "answer" in response else {})


def test_a_row_that_does_not_say_what_is_right_is_refused():
    with pytest.raises(RewardError, match=r"the label ' ' is none of the options A, B, C, D, E, F, G, H, I, J\."):
        grade("answer: B", " ", {})
    for said in ("(B)", 1, "E", ""):
        with pytest.raises(RewardError, match=r"metadata\.correct_letter .* is none of the options A, B, C, D"):
            grade("answer: B", "B", CHOICES | {"correct_letter": said})
    with pytest.raises(RewardError, match=r"metadata\.choices as a list or an object, got the text '10 m, 20 m'"):
        grade("answer: B", "B", {"choices": "10 m, 20 m"})
    with pytest.raises(RewardError, match=r"the label 'E' is none of the options A, B, C, D nor of their texts\."):
        grade("answer: E", "E", CHOICES)
    with pytest.raises(RewardError, match=r"the label '3' is none of the options A, B, C nor of their texts\."):
        grade("answer: C", "3", {"choices": ["p", "q", "r"]})
    with pytest.raises(RewardError, match=r"the label '4' is none of the options A, B, C, D nor of their texts\."):
        grade("answer: E", "4", CHOICES)
