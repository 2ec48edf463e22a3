"""Decide by algebra whether two expressions are equal. Runs in a worker: sympy may take for ever, or take all memory."""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy.parsing.sympy_parser import implicit_multiplication_application, parse_expr, standard_transformations

_TRANSFORMATIONS = (*standard_transformations, implicit_multiplication_application)
# parse_expr evaluates Python: the answers of a model get sympy's names and no builtins.
_NAMES = {**{name: getattr(sympy, name) for name in sympy.__all__}, "__builtins__": {}}


def settle(pairs: Iterable[tuple[str, str]]) -> str:
    """Return `sympy_equal` if both expressions of every pair are equal, else `wrong` or `unparseable`."""
    for answer, label in pairs:
        try:
            left, right = _parse(answer), _parse(label)
        except Exception:  # noqa: BLE001 - eval of a model's text raises anything; an answer that cannot be read is a verdict
            return "unparseable"
        if not _equal(left, right):
            return "wrong"
    return "sympy_equal"


def _parse(expression: str) -> object:
    return parse_expr(expression.replace("^", "**"), transformations=_TRANSFORMATIONS, global_dict=dict(_NAMES))


def _equal(left: object, right: object) -> bool:
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return bool(sympy.simplify(left - right) == 0)
    return bool(left == right)
