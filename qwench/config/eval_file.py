"""The file of --eval-config: evaluation sets that each have their own columns, reward and sampling.

    eval:
      defaults:
        n_samples_per_eval_prompt: 4
      datasets:
        - name: aime
          path: /data/aime-2024.jsonl
          rm_type: deepscaler
          max_response_len: 16384

A set's own value wins over that of `defaults`, which wins over the flags. Source: slime's format of the same flag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from qwench.config.checks import check_fraction, check_not_negative, check_positive, check_top_k
from qwench.config.command_line.flags import parse_value, yaml_words
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSetConfig:
    """One entry of `datasets`; what is None falls back to the flags."""

    name: str
    path: str
    rm_type: str | None = None
    n_samples_per_eval_prompt: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_response_len: int | None = None
    min_new_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    input_key: str | None = None
    label_key: str | None = None
    tool_key: str | None = None
    metadata_key: str | None = None
    metadata_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Replaces these entries of every row's metadata."""

    def __post_init__(self) -> None:
        check_positive("n_samples_per_eval_prompt", self.n_samples_per_eval_prompt)
        check_positive("max_response_len", self.max_response_len)
        check_not_negative("temperature", self.temperature)
        check_not_negative("min_new_tokens", self.min_new_tokens)
        check_fraction("top_p", self.top_p)
        check_top_k("top_k", self.top_k)


_KEYS = tuple(item.name for item in fields(EvalSetConfig))


def read_eval_file(path: Path) -> tuple[EvalSetConfig, ...]:
    """Return the sets of a file in the form of the module docstring; `datasets` may also map names to sets.

    Raises:
        ConfigError: the file cannot be read, or says what no set can be; names the file, the set and the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _sets(content)
    except OSError as error:
        raise ConfigError(f"--eval-config: cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--eval-config: {path} is not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"--eval-config: {path}: {error}") from error


def _sets(content: Any) -> tuple[EvalSetConfig, ...]:
    """Read what the file holds; ValueError says what is wrong in it."""
    outline = _mapping(_mapping(content, ("eval",), "the file")["eval"], ("defaults", "datasets"), "eval")
    defaults = _mapping(outline.get("defaults"), _KEYS[2:], "eval.defaults")
    sets = tuple(_set(entry, defaults, i) for i, entry in enumerate(_entries(outline.get("datasets"))))
    names = [one.name for one in sets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"eval.datasets must list at least one set, each under its own name; got {' '.join(names) or 'none'}")
    return sets


def _entries(datasets: Any) -> Sequence[Any]:
    if isinstance(datasets, dict):
        return [{"name": name, **(entry or {})} for name, entry in datasets.items()]
    if datasets is None or isinstance(datasets, list):
        return datasets or []
    raise ValueError("eval.datasets must be a list of sets, or map names to sets")


def _set(entry: Any, defaults: Mapping[str, Any], index: int) -> EvalSetConfig:
    place = f"eval.datasets[{index}]"
    own = _mapping(entry, _KEYS, place)
    for key in ("name", "path"):
        if own.get(key) is None:
            raise ValueError(f"{place} has no {key}")
    place = f"{place} ({own['name']})"
    given = {key: value for key, value in {**defaults, **own}.items() if value is not None}
    hints = get_type_hints(EvalSetConfig)
    try:
        return EvalSetConfig(**{key: _value(key, hints[key], value) for key, value in given.items()})
    except (ValueError, ConfigError) as error:
        raise ValueError(f"{place}: {error}") from error


def _value(key: str, annotation: Any, value: Any) -> Any:
    try:
        return parse_value(annotation, yaml_words(value))
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error


def _mapping(value: Any, known: Sequence[str], place: str) -> Mapping[str, Any]:
    """Return `value` if it is a mapping with known keys; nothing at all counts as an empty one, except for the whole file."""
    if value is None and place != "the file":
        return {}
    if not isinstance(value, dict) or (place == "the file" and "eval" not in value):
        raise ValueError(f"{place} must be a mapping with the keys {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ValueError(f"{place} has the unknown key {key!r}; known: {', '.join(known)}")
    return value
