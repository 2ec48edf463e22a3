"""Read a YAML file that a flag names."""

from __future__ import annotations

from pathlib import Path

import yaml

from qwench.files import read_small_text
from qwench.samples import Json

_MAX_VALUES = 100_000


def read_yaml_file(path: Path) -> Json:
    """Return what a YAML file says.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no text.
        yaml.YAMLError: it is not YAML, or its aliases write more than any settings, or themselves.
    """
    content = yaml.safe_load(read_small_text(path))
    if _num_values(content, {}) > _MAX_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MAX_VALUES:,} values")
    return content


def _num_values(value: Json, known: dict[int, int]) -> int:
    """Return how many values there are when every alias is written out.

    Args:
        known: the numbers of lists and mappings that were counted, by identity; too many while one is being counted.
    """
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = _MAX_VALUES + 1
        known[id(value)] = 1 + sum(_num_values(one, known) for one in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]
