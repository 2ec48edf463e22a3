"""Whether two answers are equal by algebra, as slime's sympy grader decides it; it may take all time or all memory.

Only `algebra_worker` and tests call it, in processes that can be killed.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from qwench.rewards.formula import FormulaError, Value, read_formula


def settle(pairs: Iterable[tuple[str, str]]) -> str:
    """Return `sympy_equal` if both expressions of every pair are equal, else `wrong` or `unparseable`."""
    for answer, label in pairs:
        try:
            left, right = read_formula(answer), read_formula(label)
        except (FormulaError, ArithmeticError, ValueError, TypeError, AttributeError):  # sympy refuses numbers in many ways
            return "unparseable"
        if not _equal(left, right):
            return "wrong"
    return "sympy_equal"


def _equal(left: Value, right: Value) -> bool:
    """Compare expressions by algebra, and relations, tuples and lists as they are written."""
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return bool(sympy.simplify(left - right) == 0)
    return bool(left == right)
