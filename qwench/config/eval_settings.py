"""How each evaluation set is read, answered and graded, where nothing falls back any more.

A value comes from the set's entry in --eval-config, else from its --eval- flag, else from the rollout's flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qwench.config.eval_file import EvalSetConfig, read_eval_file
from qwench.config.sections.data import DataConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """One evaluation set."""

    name: str
    path: str
    n_samples_per_prompt: int
    temperature: float
    top_p: float
    top_k: int
    min_new_tokens: int
    max_response_len: int | None
    """None: up to `max_context_len`."""
    max_context_len: int | None
    """None: the model's own limit."""
    max_prompt_len: int | None
    """None: no limit."""
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    input_key: str
    label_key: str | None
    tool_key: str
    metadata_key: str
    metadata_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Replaces these entries of every row's metadata; `rm_type` is among them when the set has its own reward."""


def eval_sets(evaluation: EvalConfig) -> tuple[EvalSetConfig, ...]:
    """Return the sets of --eval-config, or those of --eval-prompt-data, with what they themselves say.

    Raises:
        ConfigError: --eval-config cannot be read.
    """
    if evaluation.eval_config is not None:
        return read_eval_file(evaluation.eval_config)
    names, paths = evaluation.eval_prompt_data[::2], evaluation.eval_prompt_data[1::2]
    return tuple(EvalSetConfig(name=name, path=path) for name, path in zip(names, paths, strict=True))


def resolve_eval_sets(evaluation: EvalConfig, rollout: RolloutConfig, data: DataConfig) -> tuple[EvalSettings, ...]:
    """Return the settings of every set.

    Raises:
        ConfigError: --eval-config cannot be read.
    """
    return tuple(_settings(one, evaluation, rollout, data) for one in eval_sets(evaluation))


def _settings(own: EvalSetConfig, evaluation: EvalConfig, rollout: RolloutConfig, data: DataConfig) -> EvalSettings:
    reward = {} if own.rm_type is None else {"rm_type": own.rm_type}
    return EvalSettings(
        name=own.name,
        path=own.path,
        n_samples_per_prompt=_first(own.n_samples_per_eval_prompt, None, evaluation.n_samples_per_eval_prompt),
        temperature=_first(own.temperature, evaluation.eval_temperature, rollout.rollout_temperature),
        top_p=_first(own.top_p, evaluation.eval_top_p, rollout.rollout_top_p),
        top_k=_first(own.top_k, evaluation.eval_top_k, rollout.rollout_top_k),
        min_new_tokens=_first(own.min_new_tokens, evaluation.eval_min_new_tokens, rollout.rollout_min_new_tokens),
        max_response_len=_first(own.max_response_len, evaluation.eval_max_response_len, rollout.rollout_max_response_len),
        max_context_len=_first(None, evaluation.eval_max_context_len, rollout.rollout_max_context_len),
        max_prompt_len=_first(None, evaluation.eval_max_prompt_len, data.rollout_max_prompt_len),
        stop=_first(own.stop, None, rollout.rollout_stop),
        stop_token_ids=_first(own.stop_token_ids, None, rollout.rollout_stop_token_ids),
        input_key=_first(own.input_key, evaluation.eval_input_key, data.input_key),
        label_key=_first(own.label_key, evaluation.eval_label_key, data.label_key),
        tool_key=_first(own.tool_key, evaluation.eval_tool_key, data.tool_key),
        metadata_key=_first(own.metadata_key, None, data.metadata_key),
        metadata_overrides={**reward, **own.metadata_overrides},
    )


def _first(own: T | None, flag: T | None, fallback: T) -> T:
    if own is not None:
        return own
    return fallback if flag is None else flag
