"""The label of a row: the text that a reward compares answers with."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal

from qwench.data.rows import Row, is_blank
from qwench.errors import ConfigError
from qwench.samples import Json

_GSM8K = re.compile(r".*####[ \t]*(?P<answer>\S[^\n]*)", re.DOTALL)
"""gsm8k's column holds the worked solution; the answer follows the last `####`."""
_GSM8K_WITHOUT_ANSWER = re.compile(r"(?:.*\s)?####\s*", re.DOTALL)
_HOLDS_NOTHING = re.compile(r"\s*(?:\$\s*\$|\\\(\s*\\\)|\\\[\s*\\\]|\{\s*\}|\\(?:boxed|text|mbox|mathrm)\{\s*\})\s*")
"""A box, a formula or a group of LaTeX with nothing inside."""
_NOT_A_NUMBER = ("nan", "NaN")
"""How tools write a missing number as text."""


def read_label(row: Row, label_key: str | None, *, flag: str, required: bool) -> str | None:
    """Return the label of a row; numbers keep their plain form.

    Args:
        flag: names the key.
        required: a built-in reward compares answers with it. Without it, lists and records become JSON text, and a label
            may be absent.

    Raises:
        ConfigError: it is missing, or no answer can match it.
    """
    if label_key is None or (not required and label_key in row.values and row.values[label_key] is None):
        return None
    label, place = row.require(label_key, flag=flag), f"{row.place}: key {label_key!r} ({flag})"
    if isinstance(label, float) and not math.isfinite(label):
        raise _unmatchable(place, f"is {label}")
    if required:
        return _answer(label, place=place)
    return json.dumps(label, ensure_ascii=False) if isinstance(label, dict | list) else _text(label)


def _answer(label: Json, *, place: str) -> str:
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        shown = json.dumps(label, ensure_ascii=False)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ConfigError(f"{place} must be a string or a number, got {shown}; correct the label, or remove the row.")
    text = _text(label)
    if (solution := _GSM8K.fullmatch(text)) is not None:
        return solution["answer"].strip()
    if is_blank(text) or _HOLDS_NOTHING.fullmatch(text) or _GSM8K_WITHOUT_ANSWER.fullmatch(text):
        raise _unmatchable(place, "is blank")
    if text.strip() in _NOT_A_NUMBER:
        raise _unmatchable(place, f"is {text.strip()}")
    if "\\boxed" in text and text.count("{") != text.count("}"):
        raise _unmatchable(place, "has a box that does not end")
    return text


def _unmatchable(place: str, state: str) -> ConfigError:
    return ConfigError(f"{place} {state}: no answer can match it; correct the label, or remove the row.")


def _text(label: Json) -> str:
    """Return a scalar as text, a number by its digits: 1e20 is 100000000000000000000, as in the file of an integer."""
    text = str(label)
    return f"{Decimal(text):f}" if isinstance(label, float) and "e" in text else text
