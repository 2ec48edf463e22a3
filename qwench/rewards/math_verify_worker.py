"""The process in which math-verify judges; the pool kills it when it is late. Other processes do not import it."""

from __future__ import annotations

from collections.abc import Iterable

import math_verify

from qwench.rewards.algebra_worker import serve


def main() -> None:
    """Answer questions until standard input ends."""
    serve(judge)


def judge(pairs: Iterable[tuple[str, str]]) -> str:
    """Return `equal` if every answer is its label by math-verify, else `wrong` or `unparseable`."""
    # Without time limits: those of math-verify are alarms, and this process has one.
    read = [[math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in pair] for pair in pairs]
    if not all(values for pair in read for values in pair):
        return "unparseable"
    return "equal" if all(math_verify.verify(label, answer, timeout_seconds=None) for answer, label in read) else "wrong"
