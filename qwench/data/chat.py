"""Chat templates: messages of a row to the text the model reads.

All text of a row reaches the model, or the row is refused with file and line: templates skip unknown fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from qwench.data.rows import Row, check_text, is_blank, parse_json, row_error
from qwench.errors import ConfigError
from qwench.samples import Json, Message

_MAX_CHARACTERS = 2**20
_MAX_GROWTH = 10
"""By which a template may lengthen a conversation whose render is longer than `_MAX_CHARACTERS`."""
_MAY_SAY_NOTHING = frozenset({"system", "tool"})
"""Roles whose text may be empty: no instructions, a call that returned nothing."""
_NEVER_WRITTEN = (
    "image", "images", "image_url", "video", "videos", "video_url", "audio", "audios", "input_audio", "file", "function_call",
)  # fmt: skip
"""Members of messages and of their parts that say something, and that no template of text writes."""


def as_messages(value: Json, *, place: str) -> list[Message]:
    """Return a row's input as messages, each with text as its content.

    Text is one user message, unless it is the JSON of messages. Content in text parts, as OpenAI and Hugging Face write it,
    is joined.

    Raises:
        ConfigError: neither text nor a list of records with a `role` and something said.
    """
    if isinstance(value, str):
        value = _messages_in_json(value) or [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise row_error(place, f"messages must be text or a list of them that is not empty, got {_brief(value)}")
    messages = [_message(message, place=place) for message in value]
    if all(_is_empty(message) for message in messages):
        raise row_error(place, "no message of the conversation says anything")
    return messages


def check_arguments(messages: Sequence[Message], *, place: str) -> None:
    """Check the tool calls of a row: a template writes arguments in text as they are, so the model would learn broken JSON.

    Raises:
        ConfigError: the arguments of a call are a text that is not the JSON of a record.
    """
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        arguments = (call.get("function") or call)["arguments"]
        if isinstance(arguments, str):
            arguments = parse_json(f"{place}: the text of a call's arguments", arguments)
        if not isinstance(arguments, Mapping):
            raise row_error(place, f"the arguments of a tool call must be a record or its JSON text, got {_brief(call)}")


def as_prompt(value: Json, *, place: str) -> list[Message]:
    """Return the messages of a prompt, which the policy answers.

    Raises:
        ConfigError: as `as_messages`, and where the last message is an answer already.
    """
    messages = as_messages(value, place=place)
    if messages[-1]["role"] == "assistant":
        raise ConfigError(f"{place}: the conversation ends with an assistant turn; end a prompt with a message to answer.")
    return messages


def _messages_in_json(text: str) -> list[Json] | None:
    """Return the messages that a text holds as JSON; None: it is a text like any other."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found: list[Json] = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in found) else None


def _message(message: Json, *, place: str) -> Message:
    """Return one message with its content as text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise row_error(place, f"a message must be a record with `role` and `content`, got {_brief(message)}")
    content = message.get("content")
    calls = message.get("tool_calls")
    _check_is_written(message, place=place)
    _check_answers_parts(message, place=place)
    if content is None:
        if "content" in message and "tool_calls" not in message:
            raise row_error(place, "the content of a message must be text or text parts, got null")
        if not calls:
            raise row_error(place, f"a message says nothing (content and tool_calls are null or absent): {_brief(message)}")
        return message
    text = _text(content, place=place)
    read = {**message, "content": text}
    if _is_empty(read) and message["role"] not in _MAY_SAY_NOTHING:
        raise row_error(place, f"a message of role {message['role']!r} is empty")
    return read


def _is_empty(message: Message) -> bool:
    """Tell whether a message says nothing."""
    content = message.get("content")
    blank = content is None or is_blank(str(content))
    return blank and not message.get("tool_calls") and not message.get("reasoning_content")


def _check_is_written(record: Mapping[str, Json], *, place: str) -> None:
    """Refuse a message, or a part of one, with something that would not reach the model."""
    for key in _NEVER_WRITTEN:
        if record.get(key):
            raise ConfigError(
                f"{place}: a message has {key}, which does not reach the model: only text and tool_calls do; remove it."
            )


def _check_answers_parts(message: Mapping[str, Json], *, place: str) -> None:
    """Refuse calls and reasoning that a template would write as nothing, or not at all."""
    for key in ("tool_calls", "reasoning_content"):
        if message.get(key) and message["role"] != "assistant":
            raise row_error(place, f"a message of role {message['role']!r} has {key}, which only an assistant's can have")
    reasoning, calls = message.get("reasoning_content"), message.get("tool_calls")
    if reasoning is not None and not isinstance(reasoning, str):
        raise row_error(place, f"reasoning_content must be text, got {_brief(reasoning)}")
    if calls is not None and not isinstance(calls, list):
        raise row_error(place, f"tool_calls must be a list of records, got {_brief(calls)}")
    for call in calls or ():
        named = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
            raise row_error(place, f"a tool call must name its function, got {_brief(call)}")
        if not isinstance(named.get("arguments"), str | Mapping):
            raise row_error(place, f"the arguments of a tool call must be a record or its JSON text, got {_brief(call)}")


def read_tools(row: Row, key: str | None) -> list[Json] | None:
    """Return the tools of a row, given as records or as JSON text.

    Raises:
        ConfigError: they are something else, which says nothing to a model.
    """
    tools: list[Json] | None = row.decode(key, list)
    if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
        raise row_error(row.place, f"tools must be a list of records, got {_brief(tools)}")
    return tools


def _text(content: Json, *, place: str) -> str:
    """Return content as text; parts are joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        parts = [cast(Mapping[str, Json], part) for part in content]
        for part in parts:
            if isinstance(part.get("text"), str):
                _check_is_written(part, place=place)
        texts = [part.get("text") if part.get("type", "text") == "text" else None for part in parts]
        if all(isinstance(text, str) for text in texts):
            return "".join(cast(list[str], texts))
    raise row_error(place, f"the content of a message must be text or text parts, got {_brief(content)}")


class ChatRenderer:
    """A tokenizer's chat template with the options of one run."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, template_kwargs: Mapping[str, Json] | None = None) -> None:
        """Take the template of `tokenizer`.

        Raises:
            ConfigError: the tokenizer has none.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruct checkpoint, "
                "or put chat_template.jinja beside its tokenizer.json, or render the data beforehand."
            )
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        self._writes: dict[str, bool] = {}
        """Roles met so far, and whether the template writes them."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Json] | None = None,
        add_generation_prompt: bool = False,
        place: str = "chat template",
    ) -> str:
        """Return the text of a conversation.

        Raises:
            ConfigError: the template cannot render these messages, or would skip one; the message names `place`.
        """
        for message in messages:
            self._check_role(str(message["role"]), place=place)
        text = self._apply(messages, tools, add_generation_prompt=add_generation_prompt, place=place)
        if len(text) > _MAX_CHARACTERS and len(text) > _MAX_GROWTH * len(repr((messages, tools))):
            raise ConfigError(
                f"{place}: the chat template writes {len(text):,} characters around a far shorter conversation; "
                "give another template by --chat-template-path."
            )
        check_text(text, place=place)
        return text

    def _check_role(self, role: str, *, place: str) -> None:
        """Refuse a role that the template does not write; each is tried once, with a text that must occur."""
        if role not in self._writes:
            before: list[Message] = [{"role": "user", "content": "x"}]
            probe: Message = {"role": role, "content": _PROBE}
            try:
                text = self._apply(
                    [probe] if role == "system" else [*before, probe], None, add_generation_prompt=False, place=""
                )
                self._writes[role] = _PROBE in text
            except ConfigError:
                self._writes[role] = True  # the template has its own words for it, about the row itself
        if not self._writes[role]:
            raise ConfigError(
                f"{place}: role {role!r} is not one that the chat template writes; rename it (user, assistant ...)."
            )

    def _apply(
        self, messages: Sequence[Message], tools: Sequence[Json] | None, *, add_generation_prompt: bool, place: str
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._template_kwargs,
            )
        except Exception as error:  # a template computes, and may raise anything
            raise ConfigError(
                f"{place}: the chat template cannot render these messages ({type(error).__name__}: {error}); "
                "correct the row, or give another template by --chat-template-path."
            ) from error
        assert isinstance(text, str), "one conversation renders to one text"
        return text


_PROBE = "\ue001probe\ue001"


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode rendered texts at once, adding no special tokens: the template wrote them already."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _brief(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
