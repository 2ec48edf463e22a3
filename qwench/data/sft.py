"""Supervised fine-tuning data: conversations -> samples whose response has the trained tokens, in rollouts of single groups.

tokens       p0 p1 | a0 a1 u0 u1 a2 a3          a: assistant, u: the next user turn
loss_mask            1  1  0  0  1  1           response: from the first to the last trained token
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qwench.data.chat import read_tools, tokenize
from qwench.data.conversations import as_conversation
from qwench.data.cursor import DataCursor, Draw, fingerprint
from qwench.data.masks import Segment, build_mask_function
from qwench.data.packing import pack_by_tokens
from qwench.data.rows import Row, read_rows
from qwench.errors import ConfigError, counted
from qwench.observability.console import visible
from qwench.samples import Group, Json, Message, Prompt, Rollout, Sample, Status

_CHUNK_ROWS = 1000
"""Rows tokenised in one call: enough to keep its threads busy, few enough not to hold all text twice."""
_PACKED_STEPS = 100
"""Steps whose packing is tried before a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SftExample:
    """A tokenised conversation, kept compact."""

    tokens: array[int]
    """[L]"""
    loss_mask: bytes
    """[R] 0 or 1, first and last are 1; the L - R tokens before are the prompt."""
    prompt_text: str
    messages: Sequence[Message]

    def to_sample(self, draw: Draw) -> Sample:
        """Return the conversation as a finished sample."""
        R = len(self.loss_mask)
        prompt_ids = tuple(self.tokens[: len(self.tokens) - R])
        return Sample(
            prompt=Prompt(text=self.prompt_text, token_ids=prompt_ids, messages=self.messages),
            sample_id=draw.first_sample_id,
            group_id=draw.group_id,
            tokens=list(self.tokens),
            response_length=R,
            loss_mask=list(self.loss_mask),
            rollout_log_probs=[0.0] * R,
            weight_versions=[-1] * R,
            status=Status.COMPLETED,
            reward=0.0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSft:
    """The conversations that can be trained on, and how many cannot."""

    examples: Sequence[SftExample]
    num_too_long: int
    num_untrained: int
    """Conversations without a token to train on: no assistant turn, or all of them masked by `step_loss_mask`."""
    differing: Sequence[str] = ()
    """Places of conversations of which --loss-mask-type trains on other text than the chat template marks."""


def load_sft(
    spec: str,
    *,
    input_key: str,
    flag: str,
    tool_key: str | None,
    tokenizer: PreTrainedTokenizerBase,
    loss_mask_type: str | None,
    apply_chat_template_kwargs: Mapping[str, Json] | None,
    max_len: int | None,
) -> LoadedSft:
    """Read, render, mask and tokenise the conversations of `spec` (`path` or `path@[start:stop]`).

    Args:
        flag: names `input_key`.
        loss_mask_type: See `masks.build_mask_function`.
        max_len: Conversations with more tokens are dropped and counted; None: no limit.

    Raises:
        ConfigError: unreadable file or row, missing key, or nothing left.
    """
    mask = build_mask_function(loss_mask_type, tokenizer, template_kwargs=apply_chat_template_kwargs)
    derived = build_mask_function(None, tokenizer, template_kwargs=apply_chat_template_kwargs) if loss_mask_type else mask
    examples: list[SftExample] = []
    differing: list[str] = []
    num_too_long = num_untrained = 0
    for chunk in _chunks(read_rows(spec)):
        masked = list[tuple[list[Message], list[Segment]]]()
        for row in chunk:
            messages, tools = as_conversation(row, input_key=input_key, flag=flag), read_tools(row, tool_key)
            segments = mask(messages, tools, row.place)
            if derived is not mask and _differs(segments, partial(derived, messages, tools, row.place)):
                differing.append(row.place)
            masked.append((messages, segments))
        token_ids = iter(tokenize(tokenizer, [segment.text for _, segments in masked for segment in segments]))
        for messages, segments in masked:
            example = _example(messages, segments, list(islice(token_ids, len(segments))))
            if example is None:
                num_untrained += 1
            elif max_len is not None and len(example.tokens) > max_len:
                num_too_long += 1
            else:
                examples.append(example)
    if not examples:
        too_long = f"{num_too_long} longer than {max_len} tokens (raise --rollout-max-context-len), " if num_too_long else ""
        raise ConfigError(
            f"no conversation of {spec} can be trained on: {too_long}{num_untrained} without an assistant turn to learn from; "
            "give others."
        )
    return LoadedSft(examples=examples, num_too_long=num_too_long, num_untrained=num_untrained, differing=differing)


def describe_packing(examples: Sequence[SftExample], *, per_step: int, max_tokens: int | None, num_ranks: int) -> str:
    """Describe lengths and, with a cap on tokens, how full micro-batches of the first steps are.

    Args:
        max_tokens: cap of a micro-batch. None: there is none.
        num_ranks: data-parallel ranks, which have as many micro-batches each.
    """
    lengths = [len(example.tokens) for example in examples]
    trained = sum(sum(example.loss_mask) for example in examples)
    text = f"{counted(len(lengths), 'conversation')} of {sum(lengths) / len(lengths):.0f} tokens, at most {max(lengths):,}; "
    text += f"{trained / sum(lengths):.0%} of the tokens are trained on"
    if max_tokens is None:
        return text
    steps = [lengths[start : start + per_step] for start in range(0, min(len(lengths), _PACKED_STEPS * per_step), per_step)]
    num_bins = sum(len(pack_by_tokens(step, max_tokens=max_tokens, multiple_of=num_ranks)) for step in steps)
    fill = sum(map(sum, steps)) / (num_bins * max_tokens)
    return f"{text}; micro-batches are {fill:.0%} full ({num_bins / len(steps):.3g} a step)"


class SftSource:
    """Rollouts of conversations, each its own group with reward 0, in a reproducible and resumable order."""

    def __init__(self, examples: Sequence[SftExample], *, rollout_batch_size: int, shuffle: bool, seed: int) -> None:
        self._examples = examples
        self._rollout_batch_size = rollout_batch_size
        content = fingerprint(*(example.tokens.tolist() for example in examples))
        self._cursor = DataCursor(len(examples), fingerprint=content, samples_per_row=1, shuffle=shuffle, seed=seed)

    def take(self, rollout_id: int) -> Rollout:
        """Return the next `rollout_batch_size` conversations."""
        draws = self._cursor.take(self._rollout_batch_size)
        groups = [Group(group_id=draw.group_id, samples=[self._examples[draw.row].to_sample(draw)]) for draw in draws]
        return Rollout(rollout_id=rollout_id, groups=groups)

    def num_rollouts_per_epoch(self) -> int:
        """Return how many whole rollouts an epoch holds; at least 1."""
        return self._cursor.num_rollouts_per_epoch(self._rollout_batch_size)

    def state_dict(self) -> dict[str, Json]:
        """Return the position as a JSON-compatible record."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go to a saved position; a CheckpointError when it belongs to another data set."""
        self._cursor.load_state_dict(state)


def render_mask_preview(sample: Sample, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 600) -> Text:
    """Return a sample's text with the trained tokens in [[ ]] and, on a terminal, bold; cut after `max_tokens`."""
    num_prompt_tokens = len(sample.tokens) - sample.response_length
    mask = [*([0] * num_prompt_tokens), *sample.loss_mask]
    shown = list(zip(sample.tokens, mask, strict=True))[:max_tokens]
    preview = Text()
    for trained, run in groupby(shown, key=lambda pair: bool(pair[1])):
        text = visible(str(tokenizer.decode([token for token, _ in run])))
        preview.append(f"[[{text}]]" if trained else text, style="bold green" if trained else "dim")
    num_hidden = len(sample.tokens) - len(shown)
    return preview.append(f" ... ({num_hidden} more tokens)") if num_hidden else preview


def _example(messages: Sequence[Message], segments: Sequence[Segment], token_ids: Sequence[list[int]]) -> SftExample | None:
    """Join the segments up to the last trained token; None when nothing is trained."""
    trained = [i for i, segment in enumerate(segments) if segment.trained and token_ids[i]]
    if not trained:
        return None
    first, end = trained[0], trained[-1] + 1
    tokens = array("i", [token for ids in token_ids[:end] for token in ids])
    loss_mask = b"".join(bytes([segments[i].trained]) * len(token_ids[i]) for i in range(first, end))
    prompt_text = "".join(segment.text for segment in segments[:first])
    return SftExample(tokens=tokens, loss_mask=loss_mask, prompt_text=prompt_text, messages=messages)


def _differs(segments: Sequence[Segment], derive: Callable[[], list[Segment]]) -> bool:
    """Tell whether other text is trained on than the template marks; no where none can be derived from the template."""
    try:
        marked = derive()
    except ConfigError:
        return False
    # Types of --loss-mask-type also train on the newline behind a turn, as slime and miles do.
    trained, expected = ([one.text.strip() for one in side if one.trained and one.text] for side in (segments, marked))
    return trained != expected


def _chunks(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), _CHUNK_ROWS):
        yield rows[start : start + _CHUNK_ROWS]
