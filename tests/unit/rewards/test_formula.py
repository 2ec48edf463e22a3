"""The grammar of expressions: what it reads, and that it evaluates nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.config.sections.reward import RewardConfig
from qwench.rewards.algebra_worker import settle
from qwench.rewards.expressions import Question, compare
from qwench.rewards.formula import MAX_DEPTH, FormulaError, read_formula
from qwench.rewards.pool import RewardPool
from tests.unit.rewards.samples import finished

a, b, n, x, y = sympy.symbols("a b n x y")
ONE, TWO = sympy.Integer(1), sympy.Integer(2)


FUNCTIONS = "sqrt exp ln log re im sin cos tan cot sec csc asin acos atan sinh cosh tanh"


@pytest.mark.parametrize("name", FUNCTIONS.split())
def test_functions_are_those_of_sympy(name):
    assert read_formula(f"{name}(x+1)") == getattr(sympy, name)(x + 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("34", sympy.Integer(34)),
        ("(18+3a)/7.", (18 + 3 * a) / 7),  # the full stop ends a sentence
        ("1/2", ONE / 2),
        ("1/2x", x / 2),  # side by side binds as a written product does
        ("2x^2y", 2 * x**2 * y),
        ("(x)0.[3]", x / 3),
        ("-x^2", -(x**2)),
        ("2^-1", ONE / 2),
        ("2^3^2", sympy.Integer(512)),
        ("2**3", sympy.Integer(8)),
        ("--3", sympy.Integer(3)),
        ("2*-3", sympy.Integer(-6)),
        ("8/4/2", ONE),
        ("5-3-1", ONE),
        ("3(x+1)", 3 * (x + 1)),
        ("(x+1)(x-1)", (x + 1) * (x - 1)),
        ("x(y+1)", x * (y + 1)),
        ("ab", a * b),
        ("a2", 2 * a),
        ("x_1", sympy.Symbol("x_1")),
        ("xi", sympy.Symbol("xi")),
        ("2pi", 2 * sympy.pi),
        ("-oo", -sympy.oo),
        ("sqrt(8)", 2 * sympy.sqrt(2)),
        ("2sqrt(3)x", 2 * sympy.sqrt(3) * x),
        ("ln(2)", sympy.log(2)),
        ("ln^2(2)", sympy.log(2) ** 2),
        ("log(8,2)", sympy.Integer(3)),
        ("5!", sympy.Integer(120)),
        ("n!/n", sympy.factorial(n) / n),
        ("2^3!", sympy.Integer(64)),
        ("0.25", sympy.Float("0.25")),
        ("2.5e1", sympy.Float("25.0")),
        ("2e", 2 * sympy.Symbol("e")),
        ("0.1[6]", ONE / 6),
        ("(1,x+1)", (ONE, x + 1)),
        ("1,2", (ONE, TWO)),
        ("[1,2]", [ONE, TWO]),
        ("[x]", x),
        ("x<3", sympy.Lt(x, 3)),
        ("x>=1/2", sympy.Ge(x, ONE / 2)),
    ],
)
def test_expressions_read_as_they_are_written(text: str, value: object) -> None:
    assert read_formula(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "(",
            ")",
            "1+",
            "*2",
            "x=3",
            "x==3",
            "1<2<3",
            "x|y",
            "|x|",
            "x&y",
            "~x",
            "x;y",
            "x\ny",
            "x#y",
            "7//2",
            "7%2",
        ),
        *(
            "sqrt",
            "sqrt 2",
            "sqrt()",
            "ln(1,2,3)",
            "ln^x(2)",
            "if",
            "x[1]",
            "[1,2)",
            "(1,2]",
            "{1}",
            "\u00bd",
            "x\u00b2",
            "\u221a3",
        ),
        *("(1,2)+1", "[1,2]*2", "(x<3)+1", "1<2", "lambda x", "@x", "$x", "`x`", ":x", "x:=3", "...", "?"),
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(FormulaError):
        read_formula(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "'x'",
            '"x"',
            "li('x')",
            "x.real",
            "(x).args",
            "x.y",
            "().__class__",
            "__import__",
            "x__y",
            "\\137",
            "2.bit_length()",
        ),
        *("__import__('os').getcwd()", "open('/etc/passwd')", "exit()", "eval(x)", "getattr(x,y)", "print(1)", "lambda:x"),
    ],
)
def test_code_is_no_expression(text: str) -> None:
    assert settle([(text, "x")]) in ("unparseable", "wrong")
    assert settle([("x", text)]) in ("unparseable", "wrong")
    for outcome in (compare(text, "x+1"), compare("x+1", text)):
        assert isinstance(outcome, Question) or outcome.score == 0.0


@pytest.mark.parametrize(
    "text",
    [
        *("9**9**9", "2^100001", "10^99999", "x^10001", "99999!", "1e999999999", "2.0^999999999", "(9^9999)^99"),
        *(
            "(" * (MAX_DEPTH + 1) + "x" + ")" * (MAX_DEPTH + 1),
            "-" * (MAX_DEPTH + 1) + "x",
            "2^" * (MAX_DEPTH + 1) + "1",
            "x+" * 500 + "x",
        ),
    ],
)
def test_what_is_too_large_to_build_is_refused_at_once(text: str) -> None:
    with pytest.raises(FormulaError, match=r"large|deep|symbols"):
        read_formula(text)


def test_a_thousand_symbols_are_read() -> None:
    assert read_formula("x+" * 499 + "2x") == 501 * x


@given(st.text(alphabet="0123456789.+-*/^()[],!<>=xyeab_sqrtlnpi'\"\\ \n\u00b2\u03b8", max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    reason = settle([(text[:8], "x+1")])
    assert reason in ("sympy_equal", "wrong", "unparseable")


@pytest.mark.parametrize(
    ("answer", "label", "reason"),
    [
        ("x+1", "1+x", "sympy_equal"),
        ("(x+1)^2", "x^2+2x+1", "sympy_equal"),
        ("x+1", "x-1", "wrong"),
        ("x<3", "x<6/2", "sympy_equal"),
        ("x<3", "x>3", "wrong"),
        ("(1,x+1)", "(1,1+x)", "sympy_equal"),
        ("(1,2)", "[1,2]", "wrong"),
        ("x", "(x,y)", "wrong"),
    ],
)
def test_verdicts_of_algebra(answer: str, label: str, reason: str) -> None:
    assert settle([(answer, label)]) == reason


def crafted(command: str) -> str:
    """Return an answer of braces and octal escapes, which has no letters but l and i until Python evaluates it."""
    escaped = "".join(f"\\{ord(character):03o}" for character in command)
    return "{" * 42 + f"li('{escaped}')" + "}" * 42


@pytest.mark.parametrize("place", ["answer", "label"])
def test_crafted_answers_and_labels_run_nothing_and_forge_nothing(place: str, tmp_path: Path) -> None:
    attack = crafted(f"open('{tmp_path}/ran','w')")
    attacked = (f"\\boxed{{{attack}}}", "0.5") if place == "answer" else ("\\boxed{0.5}", attack)
    pool = RewardPool(RewardConfig(rm_type="math", reward_num_workers=1))
    try:
        verdicts = asyncio.run(
            pool.grade_group([finished(*attacked), finished(r"\boxed{x+2}", "x-1"), finished(r"\boxed{x-1}", "-1+x")])
        )
    finally:
        pool.close()
    assert [verdict.score for verdict in verdicts] == [0.0, 0.0, 1.0]
    assert not (tmp_path / "ran").exists()
