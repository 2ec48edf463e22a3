r"""Compare two answers by text and integers, and return a question for algebra where these do not decide.

    34.0, 034, $34$ vs 34     -> normal forms: equal
    35 vs 34, 2/4 vs 1/2      -> wrong: an integer is met by an integer, a fraction by the same reduced fraction
    \sqrt{8} vs 2\sqrt{2}     -> Question: sympy decides in a worker

Source of the rules: the sympy grader of Lightman et al., "Let's Verify Step by Step" (arXiv 2305.20050), as DeepScaleR uses it;
its exact comparison of integers is ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from qwench.rewards import latex
from qwench.samples import Verdict

MAX_ANSWER_CHARS = 1000
"""A longer answer is right only if it is the label itself; the longest answer of MATH has 159 characters."""

_ALL_TEXT = re.compile(r"^\\text\{(?P<text>.+?)\}$")
_REWRITES = (
    ("\\textdegree", ""),
    ("\\%", "%"),
    ("\\$", "$"),
    ("$", ""),
    ("%", ""),
    (" or ", " , "),
    (" and ", " , "),
    ("trillion", "*10^12"),
    ("billion", "*10^9"),
    ("million", "*10^6"),
)
_UNIT = re.compile(
    r"(?:degree|centimeter|cm|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(?:es)?s? *(?:\^[0-9]+)?"
)
_DEGREES = re.compile(r"\^ *(?:\\circ|\{\\circ\})")
_MIXED_NUMBER = re.compile(r"([0-9]) +([0-9])")
_FRACTION = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
_BRACKETS = frozenset("()[]")
_POWER_TOWER = re.compile(r"\^[0-9]+\^|\^[0-9][0-9]+|\^\(")
_NO_MATHS = re.compile(r"""['"`\\@#$&;:?]|__|[^\W\d]\w*\.\w|[)\]]\.[^\W\d]""")
"""Quotes, escapes, attribute access and other marks of code: no such text reaches a worker."""
_MAX_UNKNOWN_LETTERS = 2  # more is prose, or a function sympy would search long for
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MAX_DIGITS = 4000  # 1e999999999 is six characters, and a gigabyte as an integer
_TOLERANCE = Decimal("1e-7")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Pairs of expressions, all of which must be equal for the answer to be right."""

    pairs: tuple[tuple[str, str], ...]
    """(expression of the answer, expression of the label), in the syntax of `formula`."""


def compare(answer: str, label: str) -> Verdict | Question:
    """Judge `answer` against `label`, or return the question for algebra."""
    answer, label = answer.strip(), label.strip()
    if answer == label:
        return Verdict(score=1.0, reason="exact")
    answer_integer, label_integer = as_integer(answer), as_integer(label)
    if answer_integer is not None and label_integer is not None:
        if answer_integer != label_integer:
            return _wrong("wrong")
        return _right("exact" if is_same_number(answer, label) else "within_tolerance")
    if len(answer) > MAX_ANSWER_CHARS:
        return _wrong("unparseable")
    if latex.normal_form(answer) == latex.normal_form(label):
        return _right("normal_form_equal")
    return _compare_expressions(normal_expression(answer), normal_expression(label))


@lru_cache(maxsize=4096)  # a group's samples share their label, and many of them their answer
def normal_expression(answer: str) -> str:
    """Return an answer without units, currency, LaTeX, spaces and capitals."""
    if wrapped := _ALL_TEXT.search(answer):
        answer = wrapped.group("text")
    for written, normal in _REWRITES:
        answer = answer.replace(written, normal)
    answer = _DEGREES.sub("", _UNIT.sub("", answer))
    if answer.startswith("{") and answer.endswith("}"):
        answer = answer[1:-1]
    answer = _integer_as_digits(re.sub(r",\\! *", "", answer))
    if "\\" in answer:
        answer = _without_latex(answer)
    answer = _MIXED_NUMBER.sub(r"\1+\2", re.sub("- *", "-", answer))
    for noise in (" ", "{", "}"):
        answer = answer.replace(noise, "")
    return _integer_as_digits(answer.lower())


def _integer_as_digits(text: str) -> str:
    integer = as_integer(text)
    return text if integer is None else str(integer)


def _without_latex(text: str) -> str:
    try:
        return latex.to_expression(text)
    except Exception:  # noqa: BLE001 - pylatexenc on a model's text raises anything; broken LaTeX may still be equal as text
        return text


def _compare_expressions(answer: str, label: str) -> Verdict | Question:
    if answer == label:
        return _right("normal_form_equal")
    answers, labels = _entries(answer), _entries(label)
    same_brackets = len(labels) <= 1 or (answer[:1] == label[:1] and answer[-1:] == label[-1:])
    if not answers or len(answers) != len(labels) or not same_brackets:
        return _wrong("wrong")
    pairs = tuple(pair for pair in zip(answers, labels, strict=True) if not _same_text(*pair))
    if any(_differs_at_sight(*pair) for pair in pairs):
        return _wrong("wrong")
    if any(_NO_MATHS.search(text) for pair in pairs for text in pair):
        return _wrong("unparseable")
    if any(_POWER_TOWER.search(f"({theirs})-({ours})") for theirs, ours in pairs):
        return _wrong("unparseable")
    return Question(pairs=pairs) if pairs else _right("normal_form_equal")


def _entries(expression: str) -> list[str]:
    """Split a tuple or an interval; anything else is its own only entry."""
    expression = without_thousands_commas(expression)
    inside = expression[1:-1]
    if inside and expression[0] in _BRACKETS and expression[-1] in _BRACKETS and _BRACKETS.isdisjoint(inside):
        return [entry.strip() for entry in inside.split(",")]
    return [expression] if expression else []


def _same_text(answer: str, label: str) -> bool:
    return _integer_as_digits(answer) == _integer_as_digits(label)


def _differs_at_sight(answer: str, label: str) -> bool:
    """Tell whether two entries with different texts cannot be equal, or must not count as equal."""
    if _FRACTION.fullmatch(answer) and _FRACTION.fullmatch(label):
        return True  # 2/4 is not an answer where 1/2 is asked for
    if (as_integer(answer) is not None) or (as_integer(label) is not None):
        return True  # 2^5 is not an answer where 32 is asked for
    letters = {letter for letter in f"{answer}{label}".replace("sqrt", "").replace("frac", "") if letter.isalpha()}
    return len(letters) > _MAX_UNKNOWN_LETTERS


def _right(reason: str) -> Verdict:
    return Verdict(score=1.0, reason=reason)


def _wrong(reason: str) -> Verdict:
    return Verdict(score=0.0, reason=reason)


def without_thousands_commas(text: str) -> str:
    """Return `1,234,567` as `1234567`; commas that separate the entries of a list stay."""
    return _THOUSANDS_COMMA.sub("", text)


def as_integer(text: str) -> int | None:
    """Return the integer that `34`, `034`, `34.`, `34.0`, `3.4e1` or `1,000` writes, or None if it writes none.

    A number within 1e-7 of an integer counts as that integer. No float is involved: all digits count.
    """
    number = _as_number(text)
    if number is None:
        return None
    nearest = round(number)
    return nearest if abs(number - nearest) <= _TOLERANCE else None


def is_same_number(left: str, right: str) -> bool:
    """Tell whether both texts write the same number, to the last digit."""
    number = _as_number(left)
    return number is not None and number == _as_number(right)


def _as_number(text: str) -> Decimal | None:
    try:
        number = Decimal(without_thousands_commas(text))
    except InvalidOperation:
        return None
    return number if number.is_finite() and number.adjusted() <= _MAX_DIGITS else None
