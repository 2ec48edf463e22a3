r"""`--rm-type dapo`: +1 if the last `Answer:` line states the label's integer, else -1, with a record {score, acc, pred}.

Only the last 300 characters count. The comparison is of digits: `Answer: \boxed{34}` and `Answer: $34$ dollars` state 34,
`Answer: 34.` and a box without `Answer:` do not.

Source: DAPO (arXiv 2503.14476); the normal form is that of Minerva (arXiv 2206.14858, appendix D.1).
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from qwench.errors import RewardError
from qwench.samples import Verdict

_TAIL_CHARS = 300
_MOST_DIGITS = 4300
_SHOWN_CHARS = 60
_ANSWER_LINE = re.compile(r"(?i)answer\s*:\s*([^\n]+)")
_NO_ANSWER = "[INVALID]"
_REWRITES = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_REMOVED_WORDS = re.compile(
    r"square|ways|integers|dollars|mph|inches|hours|km|units|\\ldots|sue|points|feet|minutes|digits|cents|degrees|cm|gm|pounds"
    r"|meters|meals|edges|students|childrentickets|multiples"
)
_REMOVED_MARKS = (
    "\\text{s}",
    "\\text{.}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{}",
    "\\mathrm{th}",
    "^\\circ",
    "^{\\circ}",
    "\\;",
    ",\\!",
    "{,}",
    '"',
    "\\dots",
    "<|im_end|>",
    "<|endoftext|>",
)
_INLINE_MATHS = re.compile(r".*?\$(.*?)\$.*")
_WRAPPER = re.compile(r"\\(?:text|textbf|overline)\{(.*?)\}")
_BOX = re.compile(r"\\boxed\{(.*)\}")


def grade(response: str, label: str) -> Verdict:
    """Judge the last answer line of the response.

    Raises:
        RewardError: the label is not a number.
    """
    lines = _ANSWER_LINE.findall(response[-_TAIL_CHARS:])
    stated = normal_form(lines[-1]) if lines else _NO_ANSWER
    right = stated == integer_label(label)
    score = 1.0 if right else -1.0
    reason = "exact" if right else "wrong" if lines else "no_answer_line"
    return Verdict(score=score, reason=reason, extra={"score": score, "acc": right, "pred": stated})


@lru_cache(maxsize=4096)
def integer_label(label: str) -> str:
    """Return the digits of the integer a label states; those after the point are dropped. The samples of a group share it.

    Raises:
        RewardError: the label is not a number, or one of more digits than Python writes.
    """
    shown = label if len(label) <= _SHOWN_CHARS else f"{label[:_SHOWN_CHARS]}..."
    try:
        number = Decimal(normal_form(label))
        if number.is_finite() and number.adjusted() >= _MOST_DIGITS:
            raise RewardError(
                f"--rm-type dapo compares integers of up to {_MOST_DIGITS} digits, but the label is {shown!r}; "
                "give such labels, or another --rm-type."
            )
        return str(int(number))
    except (InvalidOperation, OverflowError, ValueError) as error:
        raise RewardError(f"--rm-type dapo compares integers, but the label is {shown!r}; use --rm-type math.") from error


def normal_form(answer: str) -> str:
    """Return an answer without its left-hand side, units, spaces and LaTeX wrappers."""
    text = answer.rpartition("=")[2]
    for written, normal in _REWRITES:
        text = text.replace(written, normal)
    text = _REMOVED_WORDS.sub("", text)
    for mark in _REMOVED_MARKS:
        text = text.replace(mark, "")
    text = _INLINE_MATHS.sub(r"$\1$", text)
    text = _BOX.sub(r"\1", _WRAPPER.sub(r"\1", text)).replace("$", "")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text.strip()
