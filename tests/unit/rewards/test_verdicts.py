"""The verdict table of the deepscaler, math and dapo rewards."""

from __future__ import annotations

import pytest

from qwench.errors import RewardError
from qwench.rewards import boxed, dapo
from qwench.rewards.algebra_worker import settle
from qwench.rewards.expressions import Question
from qwench.samples import Verdict

ANSWERS = [
    ("34", "34", 1, "exact"),
    ("34.0", "34", 1, "exact"),
    ("034", "34", 1, "exact"),
    ("34.", "34", 1, "exact"),
    (r"$34$", "34", 1, "normal_form_equal"),
    ("x=34", "34", 1, "normal_form_equal"),
    (r"34\%", "34", 1, "normal_form_equal"),
    ("34 cm", "34", 1, "normal_form_equal"),
    ("34 inches", "34", 1, "normal_form_equal"),
    ("34\N{DEGREE SIGN}", "34", 0, "wrong"),
    (r"34^\circ", "34", 1, "normal_form_equal"),
    ("34 miles per hour", "34", 0, "wrong"),
    ("three", "34", 0, "wrong"),
    ("35", "34", 0, "wrong"),
    ("-34", "34", 0, "wrong"),
    ("1,000", "1000", 1, "exact"),
    ("3.0e1", "30", 1, "exact"),
    (r"\frac{2}{4}", r"\frac{1}{2}", 0, "wrong"),
    (r"\dfrac12", r"\frac{1}{2}", 1, "normal_form_equal"),
    ("1/2", "0.5", 1, "normal_form_equal"),
    ("0.25", "1/4", 1, "sympy_equal"),
    ("2^5", "32", 0, "wrong"),
    ("10^{2}", "100", 0, "wrong"),
    ("33+1", "34", 0, "wrong"),
    (r"\sqrt{8}", r"2\sqrt{2}", 1, "sympy_equal"),
    (r"\sqrt{8}", r"3\sqrt{2}", 0, "wrong"),
    (r"\sqrt[3]{8}", r"\sqrt{8}", 0, "wrong"),
    ("x+1", "1+x", 1, "sympy_equal"),
    (r"\frac{x+1}{2}", "(x+1)/2", 1, "normal_form_equal"),
    (r"\frac{1}{x+1}", "1/x+1", 0, "wrong"),
    (r"3\frac{1}{2}", "7/2", 1, "sympy_equal"),
    (r"\frac{18+3c}{7}.", r"\frac{18+3c}{7}", 1, "sympy_equal"),
    ("x^2.", "x^2", 1, "sympy_equal"),
    ("x^2.5", "x^2", 0, "wrong"),
    ("2,1", "1,2", 0, "wrong"),
    ("(1, 2)", "(1,2.0)", 1, "normal_form_equal"),
    ("[1,2)", "(1,2)", 0, "wrong"),
    ("(1,2,3)", "(1,2)", 0, "wrong"),
    (r"\text{(B)}", "(B)", 1, "normal_form_equal"),
    ("34 million", "34000000", 0, "wrong"),
    ("12345678901234567891", "12345678901234567890", 0, "wrong"),
    ("12345678901234567890.0", "12345678901234567890", 1, "exact"),
    ("9**9**9", "34", 0, "wrong"),
    ("x^2^2", "0.5", 0, "unparseable"),
    ("((", "0.5", 0, "unparseable"),
    ("", "34", 0, "wrong"),
]


def settled(outcome: Verdict | Question) -> Verdict:
    """Finish a verdict in this process, as a worker would."""
    if isinstance(outcome, Verdict):
        return outcome
    reason = settle(outcome.pairs)
    return Verdict(score=float(reason == "sympy_equal"), reason=reason)


@pytest.mark.parametrize(("answer", "label", "score", "reason"), ANSWERS)
def test_boxed_answer_gets_its_score_and_reason(answer: str, label: str, score: int, reason: str) -> None:
    box = f"so it is \\boxed{{{answer}}}."
    for verdict in (settled(boxed.grade_after_thinking(f"hm</think> {box}", label)), settled(boxed.grade_last_box(box, label))):
        assert (verdict.score, verdict.reason) == (score, reason)


@pytest.mark.parametrize(
    ("response", "score", "reason"),
    [
        (r"\boxed{34}", 0, "no_think_marker"),
        (r"\boxed{34}</think> so 34", 0, "no_box"),
        (r"</think> \boxed{34} or rather \boxed{35}", 0, "wrong"),
        (r"</think> \boxed{35} or rather \boxed{34}", 1, "exact"),
        (r"\boxed{35}</think> \boxed{34}", 1, "exact"),
        (r"</think> \boxed{34} </think> 34", 0, "no_box"),
        (r"###Response \boxed{34}", 1, "exact"),
        (r"###Response 34 </think> \boxed{34}", 1, "exact"),
        (r"</think> \fbox{34}", 0, "no_box"),
        (r"</think> \boxed 34", 0, "no_box"),
        (r"</think> \boxed{34", 0, "no_box"),
        (r"</think> \boxed{\boxed{34}}", 1, "exact"),
        ("", 0, "no_think_marker"),
    ],
)
def test_deepscaler_reads_the_last_box_after_the_thinking(response: str, score: int, reason: str) -> None:
    verdict = settled(boxed.grade_after_thinking(response, "34"))
    assert (verdict.score, verdict.reason) == (score, reason)


def test_math_needs_no_think_marker() -> None:
    assert settled(boxed.grade_last_box(r"<think> \boxed{35} </think> \boxed{34}", "34")).score == 1
    assert settled(boxed.grade_last_box("34", "34")).reason == "no_box"


@pytest.mark.parametrize("label", [34, 34.0, r"\boxed{34}", r"the answer is \boxed{34}"])
def test_label_may_be_a_number_or_boxed(label: object) -> None:
    assert settled(boxed.grade_after_thinking(r"</think>\boxed{34}", str(label))).score == 1


@pytest.mark.parametrize("label", ["", r"\boxed{34"])
def test_label_without_an_answer_is_told_apart_from_a_wrong_answer(label: str) -> None:
    assert settled(boxed.grade_after_thinking(r"</think>\boxed{34}", label)) == Verdict(score=0.0, reason="empty_label")


@pytest.mark.parametrize(
    ("response", "label", "score", "stated"),
    [
        ("Answer: 34", "34", 1, "34"),
        ("Answer: 1\nAnswer: 34", "34", 1, "34"),
        ("Answer: 34\nAnswer: 1", "34", -1, "1"),
        ("answer : $34$", "34", 1, "34"),
        (r"Answer: \boxed{34}", "34", 1, "34"),
        (r"Answer: $x = 34$ dollars", "34", 1, "34"),
        ("Answer: 1,000", "1000", 1, "1000"),
        ("Answer: -5<|im_end|>", "-5", 1, "-5"),
        ("Answer: 34", "34.5", 1, "34"),
        ("Answer: 34.", "34", -1, "34."),
        ("Answer: 034", "34", -1, "034"),
        (r"\boxed{34}", "34", -1, "[INVALID]"),
        ("Answer: 34\n" + "x" * 289, "34", 1, "34"),  # the last 300 characters
        ("Answer: 34\n" + "x" * 290, "34", -1, "[INVALID]"),
        ("Answer: 12345678901234567891", "12345678901234567890", -1, "12345678901234567891"),
    ],
)
def test_dapo_compares_the_integer_of_the_last_answer_line(response: str, label: str, score: int, stated: str) -> None:
    verdict = dapo.grade(response, label)
    assert verdict.score == score
    assert verdict.extra == {"score": score, "acc": score == 1, "pred": stated}


def test_dapo_tells_a_missing_answer_line_from_a_wrong_one() -> None:
    assert dapo.grade("34", "34").reason == "no_answer_line"
    assert dapo.grade("Answer: 35", "34").reason == "wrong"


def test_dapo_refuses_a_label_that_is_no_number() -> None:
    for label, shown in (("x+1", r"x\+1"), ("x" * 60, "x" * 60), ("x" * 61, "x" * 60 + r"\.\.\.")):
        with pytest.raises(RewardError, match=rf"the label is '{shown}'; use --rm-type math"):
            dapo.grade("Answer: 34", label)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("x=y=7", "7"), ("an 7", "7"), ("a 7", "7"), ("$7.$", "7"), (r"\$7", "7"), (r"7\ 8", "78"), ("7 8", "78"),
        (r"\mbox{7}", "7"), (r"x,\text{and}y", "x,y"), (r"x\text{and}y", "x,y"), (r"7\text{m}", "7"), (r"\textbf{7}", "7"),
        (r"\overline{7}", "7"), ("$7$ is it", "7"), (r"\boxed{7}", "7"), ("1,000", "1000"), ("1,x", "1,x"),
        *(
            (f"7{mark}", "7")
            for mark in (
                r"\text{s}", r"\text{.}", r"\text{}^2", r"\text{}^3", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;",
                r",\!", "{,}", '"', r"\dots", "<|im_end|>", "<|endoftext|>", "meters",
            )
        ),
    ],
)  # fmt: skip
def test_dapo_leaves_out_what_stands_around_a_number(answer: str, form: str) -> None:
    assert dapo.normal_form(answer) == form


@pytest.mark.parametrize("label", ["9" * 4301, "1e4300", "1e999999999", "-1e999999999"])
def test_dapo_refuses_a_label_of_more_digits_than_can_be_written(label: str) -> None:
    with pytest.raises(RewardError, match=r"integers of up to 4300 digits") as caught:
        dapo.integer_label(label)
    assert len(str(caught.value)) < 200
    assert dapo.integer_label("9" * 4300) == "9" * 4300


def test_dapo_normalises_the_label_of_a_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    label, read, normal_form = "8" * 4000, list[str](), dapo.normal_form

    def count(text: str) -> str:
        read.append(text)
        return normal_form(text)

    monkeypatch.setattr(dapo, "normal_form", count)
    assert [dapo.grade(f"Answer: {stated}", label).score for stated in ("1", "2", "3")] == [-1.0, -1.0, -1.0]
    assert read.count(label) == 1
