"""Prompts of a data set: rows -> rendered and tokenised `Prompt`s -> groups of pending samples.

LoadedPrompts = load_prompts("train.jsonl@[:1000]", ...)        once, before any model is loaded
PromptSource(prompts).next_groups(32)                           epoch after epoch, resumable
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from qwench.data.chat import ChatRenderer, as_prompt, check_arguments, read_tools, tokenize
from qwench.data.curriculum import Curriculum
from qwench.data.cursor import DataCursor, Draw, fingerprint
from qwench.data.labels import read_label
from qwench.data.rows import Row, check_text, is_blank, read_rows, row_error
from qwench.errors import ConfigError
from qwench.samples import Group, Json, Prompt, Sample

KEY_FLAGS: Mapping[str, str] = {"input_key": "--input-key", "label_key": "--label-key"}
"""Column of training data -> the flag that names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedPrompts:
    """The prompts of a data set that fit, and how many did not."""

    prompts: Sequence[Prompt]
    num_dropped: int
    """Prompts longer than the limit."""

    def with_metadata(self, overrides: Mapping[str, Json]) -> LoadedPrompts:
        """Return the same prompts with these entries of every one's metadata replaced."""
        return replace(self, prompts=[replace(one, metadata={**one.metadata, **overrides}) for one in self.prompts])


def load_prompts(
    spec: str,
    *,
    input_key: str,
    label_key: str | None,
    metadata_key: str | None,
    tool_key: str | None,
    tokenizer: PreTrainedTokenizerBase,
    apply_chat_template: bool,
    apply_chat_template_kwargs: Mapping[str, Json] | None,
    max_prompt_len: int | None,
    pass_rate_key: str | None = None,
    require_label: bool = False,
    as_given: bool = False,
    key_flags: Mapping[str, str] = KEY_FLAGS,
) -> LoadedPrompts:
    """Read, render and tokenise the data set `spec` (`path` or `path@[start:stop]`).

    Args:
        pass_rate_key: Column of pass rates; None: there is none.
        max_prompt_len: Prompts with more tokens are dropped and counted; None: no limit.
        require_label: The reward compares with a label, so every row must have one.
        key_flags: `input_key` and `label_key` -> the flags that name them.
        as_given: A function of the user's reads the prompt, which may be of any JSON type without a chat template.

    Raises:
        ConfigError: unreadable file or row, missing key, or nothing left.
    """
    if require_label and label_key is None:
        raise ConfigError(f"the reward compares answers of {spec} with labels; name their key with {key_flags['label_key']}.")
    renderer = ChatRenderer(tokenizer, template_kwargs=apply_chat_template_kwargs) if apply_chat_template else None
    rows = read_rows(spec)
    for row in rows:
        row.check_recordable(input_key, row.values.get(input_key))
    untokenised = [
        Prompt(
            text=_render(row, input_key, key_flags["input_key"], read_tools(row, tool_key), renderer, as_given=as_given),
            token_ids=(),
            label=read_label(row, label_key, flag=key_flags["label_key"], required=require_label),
            messages=row.values[input_key],
            tools=read_tools(row, tool_key),
            metadata=row.decode(metadata_key, dict) or {},
            pass_rate=_read_pass_rate(row, pass_rate_key),
            place=row.place,
        )
        for row in rows
    ]
    token_ids = tokenize(tokenizer, [prompt.text for prompt in untokenised])
    tokenised = [replace(one, token_ids=tuple(ids)) for one, ids in zip(untokenised, token_ids, strict=True)]
    for prompt in tokenised:
        if not prompt.token_ids or is_blank(prompt.text):
            raise ConfigError(f"{prompt.place}: the prompt is empty; fill it, or remove the row.")
    prompts = [one for one in tokenised if max_prompt_len is None or len(one.token_ids) <= max_prompt_len]
    if not prompts:
        raise ConfigError(
            f"all {len(token_ids)} prompts of {spec} are longer than the limit of {max_prompt_len} tokens (the shortest has "
            f"{min(map(len, token_ids))}): the least of --rollout-max-prompt-len (evaluation: --eval-max-prompt-len) and, less "
            "one token, of --rollout-max-context-len, --embedded-kv-cache-tokens and the model's positions; raise what sets it."
        )
    return LoadedPrompts(prompts=prompts, num_dropped=len(token_ids) - len(prompts))


class PromptSource:
    """Groups of pending samples, one group for each prompt, in a reproducible and resumable order."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        n_samples_per_prompt: int,
        shuffle: bool,
        seed: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        self.curriculum = curriculum
        self._prompts = prompts
        self._n_samples_per_prompt = n_samples_per_prompt
        self._cursor = DataCursor(
            len(prompts),
            fingerprint=fingerprint(*([prompt.text, prompt.label] for prompt in prompts)),
            samples_per_row=n_samples_per_prompt,
            shuffle=shuffle,
            seed=seed,
            admits=(lambda row: True) if curriculum is None else curriculum.admits,
        )

    def next_groups(self, n: int) -> list[Group]:
        """Return the next `n` groups; their ids count over the whole run."""
        return [self._group(draw) for draw in self._cursor.take(n)]

    def num_rollouts_per_epoch(self, rollout_batch_size: int) -> int:
        """Return how many whole rollouts an epoch holds; at least 1."""
        return self._cursor.num_rollouts_per_epoch(rollout_batch_size)

    def state_dict(self, *, last_rollout_id: int | None = None) -> dict[str, Json]:
        """Return the position as a JSON-compatible record."""
        curriculum = {} if self.curriculum is None else {"curriculum": self.curriculum.state_dict()}
        return {**self._cursor.state_dict(), **curriculum}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go to a saved position; a CheckpointError when it belongs to another data set."""
        self._cursor.load_state_dict(state)
        if self.curriculum is not None and "curriculum" in state:
            self.curriculum.load_state_dict(state["curriculum"])

    def _group(self, draw: Draw) -> Group:
        prompt = self._prompts[draw.row]
        samples = [
            Sample(prompt=prompt, sample_id=draw.first_sample_id + i, group_id=draw.group_id, metadata=dict(prompt.metadata))
            for i in range(self._n_samples_per_prompt)
        ]
        return Group(group_id=draw.group_id, samples=samples)


class NoPrompts:
    """The source of a run without a data set (--disable-rollout-global-dataset): it has no group to give."""

    def next_groups(self, n: int) -> list[Group]:
        """Return nothing where nothing is asked for.

        Raises:
            ConfigError: a group is asked for.
        """
        if n:
            raise ConfigError(
                f"--disable-rollout-global-dataset: the rollout function asked for {n} prompts; it brings its own."
            )
        return []

    def num_rollouts_per_epoch(self, rollout_batch_size: int) -> int:
        """Return 1: there are no epochs."""
        return 1

    def state_dict(self, *, last_rollout_id: int | None = None) -> dict[str, Json]:
        """Return nothing: there is no position."""
        return {}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Ignore the cursor of a run with a data set."""


def _read_pass_rate(row: Row, key: str | None) -> float | None:
    if key is None:
        return None
    rate = row.values[key] if key in row.values else row.require(key, flag="--curriculum-key")
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise row_error(row.place, f"{key!r} is {rate!r}, and --curriculum-key names a pass rate from 0 to 1, or null")
    return float(rate)


def _render(row: Row, input_key: str, flag: str, tools: Json, renderer: ChatRenderer | None, *, as_given: bool) -> str:
    value = row.require(input_key, flag=flag)
    if renderer is not None:
        messages = as_prompt(value, place=row.place)
        check_arguments(messages, place=row.place)
        return renderer.render(messages, tools=tools, add_generation_prompt=True, place=row.place)
    if not isinstance(value, str) and as_given:
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise ConfigError(f"{row.place}: key {input_key!r} is not text; a list of messages needs --apply-chat-template.")
    check_text(value, place=row.place)
    return value
