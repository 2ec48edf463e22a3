"""The forms in which data sets write a conversation: messages, ShareGPT, prompt and completion, Alpaca.

    messages       {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    ShareGPT       {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    completion     {"prompt": "2+2?" or messages, "completion": "4" or messages}
    Alpaca         {"instruction": "Add.", "input": "2+2", "output": "4"}

The key of --input-key comes first. Where a row lacks it, its other keys tell the form. ShareGPT, completion and Alpaca may
have a column `system` beside them, and Alpaca a `history` of [asked, answered].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qwench.data.chat import as_messages, check_arguments
from qwench.data.rows import Row, row_error
from qwench.errors import ConfigError
from qwench.samples import Json, Message

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def as_conversation(row: Row, *, input_key: str, flag: str) -> list[Message]:
    """Return the messages of a row of fine-tuning data, whose column `flag` names.

    Raises:
        ConfigError: the row has no conversation in a form that is read, or one of its texts is empty.
    """
    messages = _read_form(row, input_key, flag)
    check_arguments(messages, place=row.place)
    return messages


def _read_form(row: Row, input_key: str, flag: str) -> list[Message]:
    for keys, read in _FORMS:
        if input_key not in keys and row.values.get(input_key) is not None:
            continue
        if all(row.values.get(key) is not None for key in keys):
            return read(row)
    value = row.require(input_key, flag=flag)
    return _sharegpt(value, place=row.place) if _is_sharegpt(value) else as_messages(value, place=row.place)


def _is_sharegpt(value: Json) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) and "from" in one for one in value)


def _sharegpt(value: Json, *, place: str) -> list[Message]:
    assert isinstance(value, list), "the form was recognised"
    messages: list[Json] = []
    for one in value:
        assert isinstance(one, Mapping), "the form was recognised"
        role = _SHAREGPT_ROLES.get(str(one["from"]))
        if role is None:
            raise ConfigError(f"{place}: `from` {one['from']!r} is unknown; known: {', '.join(_SHAREGPT_ROLES)}.")
        weight: dict[str, Json] = {"weight": one["weight"]} if "weight" in one else {}
        messages.append({"role": role, "content": one.get("value"), **weight})
    return as_messages(messages, place=place)


def _prompt_and_completion(row: Row) -> list[Message]:
    prompt, completion = row.values["prompt"], row.values["completion"]
    answer: Json = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return _after_system(row, [*as_messages(prompt, place=row.place), *as_messages(answer, place=row.place)])


def _alpaca(row: Row) -> list[Message]:
    for key in ("instruction", "input", "output"):
        if row.values.get(key) is not None and not isinstance(row.values[key], str):
            raise row_error(row.place, f"key {key!r} must be text")
    asked = [str(row.values[key]) for key in ("instruction", "input") if row.values.get(key)]
    turns = [*_history(row), ("\n\n".join(asked), row.values["output"])]
    said: list[Json] = []
    for question, answer in turns:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _after_system(row, as_messages(said, place=row.place))


def _history(row: Row) -> list[tuple[Json, Json]]:
    """Return the turns before that of an Alpaca row."""
    history = row.decode("history", list) or []
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise row_error(row.place, "key 'history' must be a list of [asked, answered]")
    return [(asked, answered) for asked, answered in history]


def _sharegpt_column(row: Row) -> list[Message]:
    value = row.values["conversations"]
    if _is_sharegpt(value):
        return _after_system(row, _sharegpt(value, place=row.place))
    return as_messages(value, place=row.place)


def _after_system(row: Row, messages: list[Message]) -> list[Message]:
    """Return the messages after the text of the column `system`."""
    system = row.values.get("system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        raise ConfigError(f"{row.place}: the column 'system' and the first message are different instructions; keep one.")
    return [*as_messages([{"role": "system", "content": system}], place=row.place), *messages]


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Row], list[Message]]], ...] = (
    (("conversations",), _sharegpt_column),
    (("prompt", "completion"), _prompt_and_completion),
    (("instruction", "output"), _alpaca),
)
