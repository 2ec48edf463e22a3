"""Evaluation sets: the file of --eval-config, and how each set is read, answered and graded.

    eval:
      defaults:
        n_samples_per_eval_prompt: 4
      datasets:
        - name: aime
          path: /data/aime-2024.jsonl
          rm_type: deepscaler
          max_response_len: 16384
        - name: tools
          path: /data/tools.jsonl
          custom_rm_path: my_rewards.score
          custom_generate_function_path: my_tools.generate

A set's own value wins over that of `defaults`, which wins over the --eval- flag, which wins over the rollout's flag.
Source: slime's format of the same flag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from qwench.config.limits import check_fraction, check_import_path, check_not_negative, check_positive, check_top_k
from qwench.config.sections.data import DataConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.values import parse_value, yaml_words
from qwench.config.yaml_file import read_yaml_file
from qwench.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """One evaluation set; fields without a default come from the flags where the file does not give them."""

    name: str
    path: str
    rm_type: str | None = None
    """--rm-type of this set. None: that of the run, or of its rows."""
    custom_rm_path: str | None = None
    """--custom-rm-path of this set. None: that of the run."""
    custom_generate_function_path: str | None = None
    """--custom-generate-function-path of this set. None: that of the run."""
    n_samples_per_eval_prompt: int
    temperature: float
    top_p: float
    top_k: int
    max_response_len: int | None
    """None: up to `max_context_len`."""
    min_new_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    input_key: str
    label_key: str | None
    tool_key: str
    metadata_key: str
    metadata_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Replaces these entries of every row's metadata."""
    max_context_len: int | None
    """None: the model's own limit."""
    max_prompt_len: int | None
    """None: no limit."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"an evaluation set's name is that of a file: at most 200 letters, digits, _, - and ., got {self.name!r:.100}."
            )
        check_positive("n_samples_per_eval_prompt", self.n_samples_per_eval_prompt)
        check_positive("max_response_len", self.max_response_len)
        check_not_negative("temperature", self.temperature)
        check_not_negative("min_new_tokens", self.min_new_tokens)
        check_fraction("top_p", self.top_p)
        check_top_k("top_k", self.top_k)
        check_import_path("custom_rm_path", self.custom_rm_path)
        check_import_path("custom_generate_function_path", self.custom_generate_function_path)

    @property
    def names_functions(self) -> bool:
        """Tell whether the set has its own reward or generate function."""
        return self.custom_rm_path is not None or self.custom_generate_function_path is not None

    @property
    def row_metadata(self) -> dict[str, Any]:
        """Return the entries that replace those of every row's metadata, the set's reward among them."""
        reward = {} if self.rm_type is None else {"rm_type": self.rm_type}
        return {**reward, **self.metadata_overrides}


_KEYS = tuple(item.name for item in fields(EvalSettings) if item.name not in ("max_context_len", "max_prompt_len"))
"""Keys of one entry of `datasets`."""


def eval_settings(evaluation: EvalConfig, rollout: RolloutConfig, data: DataConfig) -> tuple[EvalSettings, ...]:
    """Return the sets of --eval-config, or those of --eval-prompt-data.

    Raises:
        ConfigError: --eval-config cannot be read, or a set is not as it must be.
    """
    by_flags = _by_flags(evaluation, rollout, data)
    if evaluation.eval_config is not None:
        return _read_file(evaluation.eval_config, by_flags, for_function=evaluation.eval_function_path is not None)
    words = evaluation.eval_prompt_data
    return tuple(EvalSettings(name=words[i], path=words[i + 1], **by_flags) for i in range(0, len(words), 2))


def _by_flags(evaluation: EvalConfig, rollout: RolloutConfig, data: DataConfig) -> dict[str, Any]:
    """Return what the flags say of every set: the --eval- flag, or the rollout's where that is not given."""
    both: dict[str, tuple[Any, Any]] = {
        "temperature": (evaluation.eval_temperature, rollout.rollout_temperature),
        "top_p": (evaluation.eval_top_p, rollout.rollout_top_p),
        "top_k": (evaluation.eval_top_k, rollout.rollout_top_k),
        "min_new_tokens": (evaluation.eval_min_new_tokens, rollout.rollout_min_new_tokens),
        "max_response_len": (evaluation.eval_max_response_len, rollout.rollout_max_response_len),
        "max_context_len": (evaluation.eval_max_context_len, rollout.rollout_max_context_len),
        "max_prompt_len": (evaluation.eval_max_prompt_len, None),
        "input_key": (evaluation.eval_input_key, data.input_key),
        "label_key": (evaluation.eval_label_key, data.label_key),
        "tool_key": (evaluation.eval_tool_key, data.tool_key),
    }
    return {
        "n_samples_per_eval_prompt": evaluation.n_samples_per_eval_prompt,
        "stop": rollout.rollout_stop,
        "stop_token_ids": rollout.rollout_stop_token_ids,
        "metadata_key": data.metadata_key,
        **{key: fallback if own is None else own for key, (own, fallback) in both.items()},
    }


def _read_file(path: Path, by_flags: Mapping[str, Any], *, for_function: bool) -> tuple[EvalSettings, ...]:
    """Return the sets of a file in the form of the module docstring; `datasets` may also map names to sets.

    Args:
        for_function: --eval-function-path reads the file too, and its further keys are that function's.

    Raises:
        ConfigError: the file cannot be read, or says what no set can be; names the file, the set and the key.
    """
    try:
        content = read_yaml_file(path)
        return _sets(content, by_flags, for_function=for_function)
    except OSError as error:
        raise ConfigError(f"--eval-config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--eval-config: {path} is not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"--eval-config: {path}: {error}") from error


def _sets(content: Any, by_flags: Mapping[str, Any], *, for_function: bool) -> tuple[EvalSettings, ...]:
    """Read the content of the file. A ValueError describes its mistake."""
    if isinstance(content, dict) and "eval" not in content and "datasets" in content:
        content = {"eval": content}
    evaluation = _mapping(content, ("eval",), "the file")["eval"]
    known = ("defaults", "datasets")
    more = tuple(evaluation) if for_function and isinstance(evaluation, dict) else ()
    outline = _mapping(evaluation, (*known, *more), "eval")
    defaults = _mapping(outline.get("defaults"), _KEYS[2:], "eval.defaults")
    sets = tuple(_set(entry, defaults, by_flags, i) for i, entry in enumerate(_entries(outline.get("datasets"))))
    names = [one.name for one in sets]
    if not names or len({name.casefold() for name in names}) < len(names):
        raise ValueError(
            "eval.datasets must list at least one set, each under its own name (upper case is as lower case); got "
            f"{' '.join(names) or 'none'}"
        )
    return sets


def _entries(datasets: Any) -> Sequence[Any]:
    if isinstance(datasets, dict):
        return [{"name": name, **(entry or {})} for name, entry in datasets.items()]
    if datasets is None or isinstance(datasets, list):
        return datasets or []
    raise ValueError("eval.datasets must be a list of sets, or map names to sets")


def _set(entry: Any, defaults: Mapping[str, Any], by_flags: Mapping[str, Any], index: int) -> EvalSettings:
    place = f"eval.datasets[{index}]"
    own = _mapping(entry, _KEYS, place)
    for key in ("name", "path"):
        if own.get(key) is None:
            raise ValueError(f"{place} has no {key}")
    place = f"{place} ({own['name']})"
    given = {key: value for key, value in {**defaults, **own}.items() if value is not None}
    hints = get_type_hints(EvalSettings)
    try:
        return EvalSettings(**{**by_flags, **{key: _value(key, hints[key], value) for key, value in given.items()}})
    except (ValueError, ConfigError) as error:
        raise ValueError(f"{place}: {error}") from error


def _value(key: str, annotation: Any, value: Any) -> Any:
    try:
        return parse_value(annotation, yaml_words(value))
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error


def _mapping(value: Any, known: Sequence[str], place: str) -> Mapping[str, Any]:
    """Return `value` if it is a mapping with known keys. None is an empty mapping, except for the whole file."""
    if value is None and place != "the file":
        return {}
    if not isinstance(value, dict) or (place == "the file" and "eval" not in value):
        raise ValueError(f"{place} must be a mapping with the keys {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ValueError(f"{place} has the unknown key {key!r}; known: {', '.join(known)}")
    return value
