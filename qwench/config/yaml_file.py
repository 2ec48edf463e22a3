"""Read a YAML file that a flag names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from qwench.files import read_small_text
from qwench.samples import Json

_MAX_VALUES = 100_000


class _NamesOnce(yaml.SafeLoader):
    """Refuses a mapping that names a key twice: one of the two values would be lost."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:  # Any: the types of PyYAML
        """Read a mapping."""
        node = super().compose_mapping_node(anchor)
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        if twice := [name for name, number in names.items() if number > 1]:
            raise yaml.YAMLError(f"it names {twice[0]} twice")
        return node


def read_yaml_file(path: Path) -> Json:
    """Return what a YAML file says.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no text.
        yaml.YAMLError: it is not YAML, names a key twice, or its aliases write more than any settings, or themselves.
    """
    content = yaml.load(read_small_text(path), Loader=_NamesOnce)
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
