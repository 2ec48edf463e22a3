"""Spellings of answers and their scores: fonts, sizes, spaces, synonyms, matrices, units and so on.

A row of spellings.jsonl is [family, rm_type, response, label, right scores]. There are two right scores where the grader of
slime and mathematics differ.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qwench.rewards import latex
from qwench.rewards.algebra_worker import settle
from qwench.rewards.expressions import Question, compare
from qwench.rewards.graders import find_grader
from qwench.samples import Verdict
from tests.unit.rewards.samples import finished

ROWS = [json.loads(line) for line in Path(__file__).with_name("spellings.jsonl").read_text().splitlines()]


def score(outcome: Verdict | Question) -> float:
    return float(settle(outcome.pairs) == "sympy_equal") if isinstance(outcome, Question) else outcome.score


@pytest.mark.parametrize("family", sorted({row[0] for row in ROWS}))
def test_spellings_score_as_they_should(family: str) -> None:
    rows = [row[1:] for row in ROWS if row[0] == family]
    graded = [(response, label, score(find_grader(rm_type)(finished(response, label)))) for rm_type, response, label, _ in rows]
    assert [outcome for outcome, (*_, right) in zip(graded, rows, strict=True) if outcome[2] not in right] == []


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        # Further members of the families, none of which is in the file.
        (r"\boldsymbol{34}", "34"),
        (r"\mathit{34}", "34"),
        (r"\bm{x+1}", "x+1"),
        (r"{\sf 34}", "34"),
        (r"\textcolor{blue}{\frac{1}{2}}", r"\frac12"),
        (r"\Big[3,4\Big]", "[3,4]"),
        (r"\left\{3,4\right\}", r"\{3,4\}"),
        (r"x\leqslant 3", r"x\leq 3"),
        (r"x \neq 0", r"x\ne 0"),
        (r"a\rightarrow b", r"a\to b"),
        (r"\begin{bmatrix}x\\y\end{bmatrix}", r"\begin{pmatrix}x\\ y\end{pmatrix}"),
        ("\\frac{2\N{GREEK SMALL LETTER PI}}{3}", r"\frac{2\pi}{3}"),
        (r"34\enspace\text{cm}", "34"),
        (r"\sfrac{3}{7}", r"\frac{3}{7}"),
        (r"{2}\times 10^{5}", r"2\times 10^{5}"),
        ("320000", r"320000 \mbox{ acres}"),
        (r"5 \mbox{ units}.", "5"),
        (r"\mbox{blue}", "blue"),
        (r"60\textdegree", "60"),
    ],
)
def test_families_are_wider_than_their_rows(answer: str, label: str) -> None:
    assert score(compare(answer, label)) == 1.0


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (r"\boldsymbol{35}", "34"),
        (r"x\ge 3", r"x\leq 3"),
        (r"\Bigl(3,4\Bigr]", "(3,4)"),
        (r"\begin{bmatrix}1\\3\end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\frac{a+b}{2}", r"a+\frac{b}{2}"),
        (r"\phi", r"\theta"),
        (r"\mbox{blue}", r"\mbox{red}"),
        (r"\mathbb{R}", r"\mathbb{Q}"),
    ],
)
def test_what_looks_alike_is_not_taken_for_equal(answer: str, label: str) -> None:
    assert score(compare(answer, label)) == 0.0


def test_a_number_that_is_only_close_has_a_reason_that_says_so() -> None:
    assert compare("1e-10", "0") == Verdict(score=1.0, reason="within_tolerance")
    assert compare("17.00000001", "17") == Verdict(score=1.0, reason="within_tolerance")
    assert compare("1,000.0", "1000") == Verdict(score=1.0, reason="exact")


PLAIN = st.sampled_from(
    ["1", "23", "x", "y", "+", "-", "=", "(", ")", ",", r"\pi ", r"\cdot ", r"\le ", r"\theta ", r"\bigl", "~"]
)
ARGUMENT = st.lists(PLAIN, max_size=4).map("".join)
CONSTRUCT = st.one_of(
    PLAIN,
    st.builds(r"\frac{{{}}}{{{}}}".format, ARGUMENT, ARGUMENT),
    st.builds(r"\sqrt{{{}}}".format, ARGUMENT),
    st.builds(r"\boldsymbol{{{}}}".format, ARGUMENT),
    st.builds(r"\text{{{}}}".format, st.sampled_from(["cm", "or", ""])),
)


@given(st.lists(CONSTRUCT, max_size=6).map("".join))
@example(r"\frac{}{\pi }")
@settings(max_examples=150, deadline=None)
def test_the_small_reader_reads_as_the_library_does(source: str) -> None:
    assume("--" not in source)  # a dash, which the library alone reads
    small, library = latex._Reader(source).sequence(depth=0), latex._by_library(source).translate(latex._UNICODE)
    assert "".join(small.translate(latex._UNICODE).split()) == "".join(library.split())


def test_commands_that_read_files_or_the_clock_are_silent(tmp_path: Path) -> None:
    (tmp_path / "label.tex").write_text("34")
    assert latex.to_expression(rf"\input{{{tmp_path / 'label.tex'}}}\textcolor{{red}}{{x}}").endswith("x")
    assert "34" not in latex.to_expression(rf"\input{{{tmp_path / 'label.tex'}}}")
    assert latex.to_expression(r"\today") == ""
