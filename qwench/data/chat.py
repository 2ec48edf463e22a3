"""Chat templates: messages of a row to the text the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qwench.errors import ConfigError
from qwench.samples import Json, Message


def as_messages(value: Json, *, place: str) -> list[Message]:
    """Return a row's input as messages; text is one user message.

    Raises:
        ConfigError: neither text nor a list of records with a `role` and something said.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{place}: messages must be text or a list of them that is not empty, got {_brief(value)}.")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"{place}: a message must be a record with `role` and `content`, got {_brief(message)}.")
        if "content" not in message and "tool_calls" not in message:
            raise ConfigError(f"{place}: a message must have `content` or `tool_calls`, got {_brief(message)}.")
    return value


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
            ConfigError: the template cannot render these messages; the message names `place`.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._template_kwargs,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"{place}: the chat template cannot render these messages ({error}).") from error
        assert isinstance(text, str), "one conversation renders to one text"
        return text


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode rendered texts at once, adding no special tokens: the template wrote them already."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _brief(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
