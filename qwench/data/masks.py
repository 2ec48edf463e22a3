"""The trained part of a rendered conversation: conversation -> segments of text, each trained or not.

    <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n   not trained
    <think>\\n\\n</think>\\n\\nhello<|im_end|>                    trained: the text that the policy writes
    \\n                                                       not trained

Segments are tokenised one by one, as in generation, where the prompt's tokens are fixed before the first one is sampled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from qwench.data.chat import ChatRenderer
from qwench.errors import ConfigError
from qwench.samples import Json, Message

# A private-use character: no data set's answer begins or ends with it.
_SENTINEL = "\ue000"
_DISTILL_TOKEN = "<\uff5cAssistant\uff5c>"
_FILLER: Message = {"role": "user", "content": "x"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of rendered text."""

    text: str
    trained: bool


Conversation = Sequence[Message]
MaskFunction = Callable[[Conversation, Sequence[Json] | None, str], list[Segment]]
"""(messages, tools, place for error messages) -> segments."""


def build_mask_function(
    loss_mask_type: str | None, tokenizer: PreTrainedTokenizerBase, *, template_kwargs: Mapping[str, Json] | None = None
) -> MaskFunction:
    """Return the function that finds the trained segments of a conversation.

    Args:
        loss_mask_type: None derives the mask from the chat template, and the text is exactly what the template renders.
            `qwen` and `qwen3` render message by message, so that every turn is written as if it were the last (qwen3: each
            behind a user turn, which keeps its thinking), and train on all of an assistant message after its header.
            `distill_qwen` trains on the last message's bare content after the first message; `qwen` means it as well when
            the tokenizer is a DeepSeek distillate's.
    """
    renderer = ChatRenderer(tokenizer, template_kwargs=template_kwargs)
    kinds: dict[str | None, type[DerivedMask | MessageMask | DistillMask]] = {
        None: DerivedMask,
        "qwen": MessageMask,
        "qwen3": IsolatedMessageMask,
        "distill_qwen": DistillMask,
    }
    if loss_mask_type not in kinds:
        known = ", ".join(kind for kind in kinds if kind)
        raise ConfigError(f"unknown --loss-mask-type {loss_mask_type!r}; known: {known}; leave it out to derive the mask.")
    if loss_mask_type == "qwen" and _DISTILL_TOKEN in tokenizer.get_added_vocab():
        loss_mask_type = "distill_qwen"
    return kinds[loss_mask_type](renderer, tokenizer)


class DerivedMask:
    """Assistant turns of the full render, from the end of the generation prompt through the end marker.

    A turn is found by rendering the conversation again with another content in its place: the texts differ exactly there.
    """

    def __init__(self, renderer: ChatRenderer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._renderer = renderer
        self._opening = _generation_prompt(renderer)
        # In this order a marker comes before those that it begins with.
        markers = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), reverse=True)
        self._end_marker = re.compile(r"\s*(?:" + "|".join(map(re.escape, markers)) + ")")

    def __call__(self, messages: Conversation, tools: Sequence[Json] | None, place: str) -> list[Segment]:
        """Return the segments of the full render."""
        full = self._renderer.render(messages, tools=tools, place=place)
        segments: list[Segment] = []
        position = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            changed = [*messages[:index], {"role": "assistant", "content": _SENTINEL}, *messages[index + 1 :]]
            other = self._renderer.render(changed, tools=tools, place=place)
            start, end = self._span(full, other, position)
            _check_span(full[start:end], message, place)
            segments.append(Segment(text=full[position:start], trained=False))
            segments.append(Segment(text=full[start:end], trained=_is_wanted(message)))
            position = end
        return [*segments, Segment(text=full[position:], trained=False)]

    def _span(self, full: str, other: str, position: int) -> tuple[int, int]:
        """Return where the turn that differs between the two renders starts and ends in `full`."""
        content_start = _common_prefix(full, other)
        content_end = len(full) - _common_prefix(full[content_start:][::-1], other[content_start:][::-1])
        # What the template itself writes after the generation prompt (an empty think block) the policy has to write too.
        # The prompt may reach into what differs: it opens a think block that only one of the two renders has.
        opening = full.rfind(self._opening, position, content_start + max(len(self._opening) - 1, 0))
        start = content_start if opening < 0 else opening + len(self._opening)
        marker = self._end_marker.match(full, content_end)
        return start, marker.end() if marker else content_end


class MessageMask:
    """Every message rendered by itself; an assistant's is trained on from its header to the end."""

    def __init__(self, renderer: ChatRenderer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._renderer = renderer
        self._opening = _generation_prompt(renderer)
        self._before, twice = renderer.render([_FILLER]), renderer.render([_FILLER, _FILLER])
        self._default_system = self._before[: 2 * len(self._before) - len(twice)]
        """Text that the template puts before a conversation without a system message."""

    def __call__(self, messages: Conversation, tools: Sequence[Json] | None, place: str) -> list[Segment]:
        """Return header and rest of each message."""
        segments: list[Segment] = []
        for index, turn in enumerate(self._turns(messages)):
            text = self._render(turn, tools if index == 0 else None, is_first=index == 0, place=place)
            header = self._header(text, is_first=index == 0) if turn[0]["role"] == "assistant" else len(text)
            segments.append(Segment(text=text[:header], trained=False))
            segments.append(Segment(text=text[header:], trained=_is_wanted(turn[0])))
        return segments

    def _turns(self, messages: Conversation) -> list[Conversation]:
        """Return the messages that are rendered together."""
        return [[message] for message in messages]

    def _header(self, text: str, *, is_first: bool) -> int:
        """Return where an assistant's text begins: after the generation prompt, or the part of it that this message has."""
        if text.startswith(self._opening):
            return len(self._opening)
        answer: Message = {"role": "assistant", "content": _SENTINEL}
        return _common_prefix(self._render([answer], None, is_first=is_first, place="an answer"), text)

    def _render(self, turn: Conversation, tools: Sequence[Json] | None, *, is_first: bool, place: str) -> str:
        text = self._renderer.render(turn, tools=tools, place=place)
        return text if is_first else text.removeprefix(self._default_system)


class IsolatedMessageMask(MessageMask):
    """As `MessageMask`, but each message is rendered after a user turn: the first one before it. Tool results in a row are
    rendered together, as templates write them into one turn."""

    def _turns(self, messages: Conversation) -> list[Conversation]:
        runs = groupby(messages, key=lambda message: message["role"] == "tool")
        return [turn for is_tool, run in runs for turn in ([list(run)] if is_tool else [[one] for one in run])]

    def _render(self, turn: Conversation, tools: Sequence[Json] | None, *, is_first: bool, place: str) -> str:
        if is_first:
            tail = self._before.removeprefix(self._default_system)
            return self._renderer.render([*turn, _FILLER], tools=tools, place=place).removesuffix(tail)
        return self._renderer.render([_FILLER, *turn], place=place).removeprefix(self._before)


class DistillMask:
    """The generation prompt of the first message, then the last message's content as it is."""

    def __init__(self, renderer: ChatRenderer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._renderer = renderer

    def __call__(self, messages: Conversation, tools: Sequence[Json] | None, place: str) -> list[Segment]:
        """Return prompt and content."""
        prompt = self._renderer.render(messages[:1], tools=tools, add_generation_prompt=True, place=place)
        content = messages[-1].get("content")
        if not isinstance(content, str):
            raise ConfigError(
                f"{place}: --loss-mask-type distill_qwen needs text as the last message's content; "
                "write it as text, or leave --loss-mask-type out."
            )
        return [Segment(text=prompt, trained=False), Segment(text=content, trained=_is_wanted(messages[-1]))]


def _generation_prompt(renderer: ChatRenderer) -> str:
    conversation = [_FILLER]
    return renderer.render(conversation, add_generation_prompt=True).removeprefix(renderer.render(conversation))


def _is_wanted(message: Message) -> bool:
    """Tell whether a row asks to train on this message; `step_loss_mask` 0, or OpenAI's `weight` 0, says no."""
    return message.get("step_loss_mask") in (None, 1) and message.get("weight") != 0


def _check_span(span: str, message: Message, place: str) -> None:
    """Refuse a template that does not write the answer where the span is."""
    content = message.get("content")
    if isinstance(content, str) and content.split("</think>")[-1].strip() not in span:
        raise ConfigError(f"{place}: no loss mask can be derived from this chat template; give one with --loss-mask-type.")


def _common_prefix(a: str, b: str) -> int:
    """Return the length of the common prefix, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
