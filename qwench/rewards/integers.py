"""Read integers as people and models write them, and compare them exactly, however long they are."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MAX_DIGITS = 4000  # 1e999999999 is six characters, and a gigabyte as an integer
_TOLERANCE = Decimal("1e-7")


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
