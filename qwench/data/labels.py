"""What a row's label is, as the text that graders compare with.

A label that no answer can equal grades every response to 0 without a word, so it is refused with file and line.
"""

from __future__ import annotations

import json
import math
import re

from qwench.data.rows import Row
from qwench.errors import ConfigError
from qwench.samples import Json

_GSM8K = re.compile(r".*####[ \t]*(?P<answer>\S[^\n]*)", re.DOTALL)
"""gsm8k's column holds the worked solution; the answer stands behind the last `####`."""


def read_label(row: Row, label_key: str | None, *, required: bool) -> str | None:
    """Return the label of a row; numbers keep their plain form.

    Args:
        required: a built-in reward compares answers with it. Without it, lists and records become JSON text, and a label
            may be absent.

    Raises:
        ConfigError: it is missing, or no answer can match it.
    """
    if label_key is None or (not required and label_key in row.values and row.values[label_key] is None):
        return None
    label = row.require(label_key, flag="--label-key")
    if isinstance(label, float) and not math.isfinite(label):
        raise ConfigError(f"{row.place}: key {label_key!r} (--label-key) is {label}: no answer can match it.")
    if required:
        return _answer(label, place=f"{row.place}: key {label_key!r} (--label-key)")
    return json.dumps(label, ensure_ascii=False) if isinstance(label, dict | list) else str(label)


def _answer(label: Json, *, place: str) -> str:
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        shown = json.dumps(label, ensure_ascii=False)
        raise ConfigError(f"{place} must be a string or a number, got {shown if len(shown) <= 60 else shown[:57] + '...'}.")
    text = str(label)
    if (solution := _GSM8K.fullmatch(text)) is not None:
        return solution["answer"].strip()
    if not text.strip():
        raise ConfigError(f"{place} is blank: no answer can match it.")
    if "\\boxed" in text and text.count("{") != text.count("}"):
        raise ConfigError(f"{place} has a box that does not end: no answer can match it.")
    return text
