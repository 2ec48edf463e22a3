"""The stand-ins of slime's and miles' graders answer in their form."""

import pytest

from qwench.foreign.built_in import compute_score, extract_answer, f1_score, grade_after_thinking, grade_answer


def test_f1_comes_with_precision_and_recall():
    # shared: red fox; stated 3 words, wanted 2 (articles do not count)
    assert f1_score("the red fox ran", "a red fox") == pytest.approx((0.8, 2 / 3, 1.0))
    assert f1_score("whale", "fox") == f1_score(None, "fox") == f1_score("yes", "no") == f1_score("", "fox") == (0, 0, 0)


def test_a_strict_box_stands_in_the_last_hundred_characters():
    near = "\\boxed{34}" + "x" * 90
    assert compute_score(near, "34", strict_box_verify=True) == {"score": 1.0, "acc": True, "pred": "34"}
    assert compute_score(near + "x", "34", strict_box_verify=True) == {"score": -1.0, "acc": False, "pred": None}


def test_the_last_box_is_the_answer():
    assert [extract_answer(text) for text in ("\\boxed{1} or \\boxed{\\frac{1}{2}}", "none")] == ["\\frac{1}{2}", None]


def test_otherwise_the_answer_line_is_graded():
    right = {"score": 1.0, "acc": True, "pred": "34"}
    assert compute_score("so\nAnswer: 34", 34) == right
    assert compute_score("34\nAnswer: 35", "34") == {"score": -1.0, "acc": False, "pred": "35"}


@pytest.mark.parametrize("label", [34, 34.0, "34"])
def test_labels_may_be_numbers(label):
    assert grade_answer("\\boxed{34}", label)
    assert grade_after_thinking("</think>\\boxed{34}", label) == 1
    assert not grade_answer("\\boxed{34}", "")


@pytest.mark.parametrize(("stated", "right"), [("(x+1)^2", True), ("(x+2)^2", False), ("1", False)])
def test_a_box_is_right_where_it_is_equal_or_sympy_says_so(stated, right):
    label = "x^2+2x+1"
    assert grade_answer(f"\\boxed{{{stated}}}", label) is right
    assert grade_after_thinking(f"</think>\\boxed{{{stated}}}", label) == right
    assert not grade_answer(label, label), "there is no box"
