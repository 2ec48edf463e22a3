"""Integers, normal forms and expressions of answers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.rewards import latex
from qwench.rewards.algebra_worker import settle
from qwench.rewards.boxed import grade_last_box, last_box
from qwench.rewards.expressions import Question, as_integer, compare, normal_expression

INTEGERS = st.integers(min_value=-(10**40), max_value=10**40)
# Text in which the grammar of answers is dense.
ANSWER_TEXT = st.text(alphabet="0123456789.,/^*+-=()[]{}\\ xyfracsqtboe%$", max_size=40)


@given(INTEGERS)
def test_every_spelling_of_an_integer_is_that_integer(number: int) -> None:
    for spelling in (f"{number}", f"{number:,}", f"{number}.0", f"{number}.", f" {number} ", f"{number}e0"):
        assert as_integer(spelling) == number


@given(INTEGERS, INTEGERS)
def test_integers_are_right_exactly_when_equal(answer: int, label: int) -> None:
    outcome = compare(f"{answer:,}", f"{label}.0")
    assert not isinstance(outcome, Question)
    assert outcome.score == float(answer == label)


@pytest.mark.parametrize("text", ["34.5", "1,00", "1e999999999", "inf", "nan", "", "3 4", "x", "1,2"])
def test_what_is_no_integer_is_none(text: str) -> None:
    assert as_integer(text) is None


@given(ANSWER_TEXT, ANSWER_TEXT)
@settings(max_examples=300)
def test_any_text_gets_an_outcome_and_itself_is_always_right(answer: str, label: str) -> None:
    same = compare(answer, answer)
    assert not isinstance(same, Question)
    assert same.score == 1.0
    outcome = compare(answer, label)
    if isinstance(outcome, Question):
        assert outcome.pairs
    else:
        assert outcome.score in (0.0, 1.0)


@given(ANSWER_TEXT)
def test_last_box_holds_what_was_boxed(text: str) -> None:
    expected = text if balanced(text) and "\\boxed" not in text else None
    if expected is not None:
        assert last_box(f"\\boxed{{1}} and \\boxed{{{text}}} end }}") == expected


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("34", None),
        ("", None),
        (r"\boxed", None),
        (r"\boxed 34", None),
        (r"\boxed 3{4}", None),
        ("12345{6}", None),
        (r"\boxed{34", None),
        (r"\boxed{1} then \boxed{34", None),
        (r"\boxed{1} then \boxed 34", None),
        (r"\boxed{}", ""),
        (r"\boxed{34}", "34"),
        (r"\boxed{\frac{1}{2}}}", r"\frac{1}{2}"),
    ],
)
def test_last_box_is_the_text_within_its_braces_or_none(text: str, held: str | None) -> None:
    assert last_box(text) == held


def balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{72}1", r"\frac{72}1"),
        ("3/4", r"\frac{3}{4}"),
        ("03/4", "03/4"),
        (".5", r"\frac{1}{2}"),
        (r"x^{.5} + .5", "x^{0.5}+0.5"),
        ("x^{0.5}", "x^{0.5}"),
        ("x = 7", "7"),
        ("abc = 7", "abc=7"),
        ("abc=7", "abc=7"),
        ("xy=7", "7"),
        ("x=y=7", "x=y=7"),
        (r"\text{ 12 }", "12"),
        (r"12\text{ cm}", "12"),
        (r"12\text{ cm} or 5\text{ in}", r"12\text{ cm} or 5\text{ in}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"\sqrt3 + \sqrt{5}", r"\sqrt{3}+\sqrt{5}"),
        (r"90^{\circ}", "90"),
        ("", ""),
    ],
)
def test_mathd_normal_form(answer: str, form: str) -> None:
    assert latex.normal_form(answer) == form


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (r"\text{Seven Apples}", "sevenapples"),
        ("{x+1}", "x+1"),
        ("{x+1", "x+1"),
        (r"{\pi/4}", "pi/4"),
        (r"1,\! 000", "1000"),
        ("034.0", "34"),
        ("3 1/2", "3+1/2"),
        ("- 5", "-5"),
        (r"\$5", "5"),
        ("5 million", "5*10^6"),
        ("5 billion", "5*10^9"),
        ("5 trillion", "5*10^12"),
        ("1 or 2", "1,2"),
        ("1 and 2", "1,2"),
        ("50%", "50"),
        (r"50\%", "50"),
        ("12 feet^2", "12"),
        (r"90^{\circ}", "90"),
        ("X + Y", "x+y"),
        (r"2\frac{1}{2}", "2+1/2"),
        (r"\frac{1}", r"\frac1"),
        (r"\sqrt", r"\sqrt"),
    ],
)
def test_normal_expression(answer: str, form: str) -> None:
    assert normal_expression(answer) == form


@pytest.mark.parametrize(
    ("source", "expression"),
    [
        (r"\frac{1}{2}", "1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"\frac{a+b}{2x}", "(a+b)/(2x)"),
        (r"3\frac{1}{2}", "3 1/2"),
        (r"\frac{\sqrt{3}}{\sqrt 2}", "sqrt(3)/sqrt(2)"),
        (r"\sqrt[3]{x}", "(x)**(1/(3))"),
        (r"2\cdot 3 \times \pi", "2* 3 * pi"),
        (r"\left(\infty\right)", "(oo)"),
        (r"\mathrm{A}\%", "A%"),
    ],
)
def test_latex_becomes_an_expression(source: str, expression: str) -> None:
    assert latex.to_expression(source) == expression


@pytest.mark.parametrize("source", [r"\frac{1}", r"\sqrt", r"\sqrt[3", "{" * 100])
def test_broken_latex_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"argument|deep"):
        latex.to_expression(source)


def test_answers_beyond_the_length_limit_are_right_only_as_the_label_itself() -> None:
    long = "y" * 1001
    assert compare(long, long).score == 1.0  # type: ignore[union-attr]  # the same text is no question
    assert compare(long, "x").reason == "unparseable"  # type: ignore[union-attr]  # too long to be one
    assert isinstance(compare(long[1:], "x"), Question)


@pytest.mark.parametrize(
    ("text", "integer"),
    [("34.0000001", 34), ("33.9999999", 34), ("34.00000011", None), ("1e4000", 10**4000), ("1e4001", None)],
)
def test_a_number_near_an_integer_is_it_and_one_of_too_many_digits_is_none(text: str, integer: int | None) -> None:
    assert as_integer(text) == integer


@pytest.mark.parametrize("answer", ["x@1", "x'", "x:1", "x.x", "(x).y", "2^2^x", "x^12", "x^(1+1)"])
def test_code_and_towers_of_powers_are_not_asked_about(answer: str) -> None:
    assert compare(answer, "x").reason == "unparseable"  # type: ignore[union-attr]  # no question


def test_a_box_asks_whether_its_content_equals_the_label() -> None:
    assert grade_last_box(r"so \boxed{x+y+1}", r"\boxed{1+y+x}") == Question(pairs=(("x+y+1", "1+y+x"),))


@pytest.mark.parametrize(
    ("answer", "score"),
    [("(1,23)", 1.0), ("(01, 23.0)", 1.0), ("(3,23)", 0.0), ("(1,24)", 0.0), ("(1,33)", 0.0), ("(1,23]", 0.0), ("[1,23)", 0.0)],
)
def test_every_entry_of_a_tuple_and_its_brackets_count(answer: str, score: float) -> None:
    assert compare(answer, "(1,23)").score == score  # type: ignore[union-attr]  # numbers are no question


def test_more_than_two_letters_are_prose() -> None:
    assert compare("x+y+1", "1+y+x") == Question(pairs=(("x+y+1", "1+y+x"),))
    assert compare("x+y+z", "z+y+x").reason == "wrong"  # type: ignore[union-attr]  # prose is no question


@pytest.mark.parametrize("code", ["__import__('os').getcwd()", "open('/etc/passwd')", "exit()", "().__class__"])
def test_python_in_an_answer_is_not_run(code: str) -> None:
    assert settle([(code, "x")]) in ("unparseable", "wrong")


FONTS = (
    "text", "textbf", "textit", "mathrm", "mathbf", "mathit", "mathsf", "mathtt", "boldsymbol", "bm", "pmb", "fbox", "boxed",
    "operatorname", "overline",
)  # fmt: skip


@pytest.mark.parametrize("command", FONTS)
def test_of_a_font_or_a_box_only_the_argument_counts(command):
    assert latex.to_expression(rf"1+\{command}{{x}}") == "1+x"


@pytest.mark.parametrize("command", ["frac", "dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"])
def test_every_fraction_is_one(command):
    assert latex.to_expression(rf"\{command}{{1}}{{x+2}}") == "1/(x+2)"


@pytest.mark.parametrize(
    ("command", "meaning"),
    [
        ("pi", "pi"), ("infty", "oo"), ("cup", "U"), ("cdot", "*"), ("times", "*"), ("div", "/"), ("ne", "\N{NOT EQUAL TO}"),
        ("leqslant", "\N{LESS-THAN OR EQUAL TO}"), ("geqslant", "\N{GREATER-THAN OR EQUAL TO}"), ("left", ""), ("right", ""),
        ("displaystyle", ""), ("quad", " "), ("qquad", " "),
    ],
)  # fmt: skip
def test_a_command_without_arguments_is_a_sign_or_nothing(command, meaning):
    assert latex.to_expression(rf"2\{command}{{}}3") == f"2{meaning}3"
