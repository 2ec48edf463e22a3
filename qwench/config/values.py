"""Spelling of values: command-line words to a value of a type, and back."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from qwench.files import MAX_NAME_BYTES

_LARGEST_FLOAT32 = 3.4028234663852886e38
TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")


def strip_none(annotation: Any) -> Any:
    """Return T for `T | None`, else the annotation itself."""
    if get_origin(annotation) in (UnionType, Union):  # Literal[...] | None is a typing.Union up to Python 3.13
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        assert len(kinds) == 1, f"a field may be T or T | None, not {annotation}"
        return kinds[0]
    return annotation


def allows_none(annotation: Any) -> bool:
    """Tell whether the annotation is `T | None`."""
    return NoneType in get_args(annotation)


def takes_many(annotation: Any) -> bool:
    """Tell whether the annotation takes any number of values."""
    return get_origin(strip_none(annotation)) is tuple


def choices(annotation: Any) -> tuple[str, ...]:
    """Return the values that the annotation lists; none where it is open."""
    kind = strip_none(annotation)
    return tuple(get_args(kind)) if get_origin(kind) is Literal else ()


def metavar(annotation: Any) -> str:
    """Return how the value is shown in help texts."""
    kind = strip_none(annotation)
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if get_origin(kind) is tuple:
        return f"{metavar(get_args(kind)[0])} ..."
    if get_origin(kind) is Mapping:
        return "JSON"
    return {bool: "[true|false]", str: "TEXT", Path: "PATH"}.get(kind) or str(kind.__name__).upper()


def parse_value(annotation: Any, values: Sequence[str]) -> Any:
    """Convert command-line words to a value of `annotation`; raise ValueError that says what was expected."""
    kind = strip_none(annotation)
    if get_origin(kind) is tuple:
        return tuple(_parse_one(get_args(kind)[0], value) for value in values)
    if allows_none(annotation) and values[0] == "None":
        return None
    return _parse_one(kind, values[0])


def _parse_one(kind: Any, value: str) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"must be one of {', '.join(get_args(kind))}; got {value!r}")
        return value
    if get_origin(kind) is Mapping:
        return _parse_json_object(value)
    if kind is bool:
        return _parse_bool(value)
    if "\0" in value:
        raise ValueError(f"must not hold a NUL character, got {_short(value)}")
    if kind is Path and not value:
        raise ValueError("must be a path, got nothing; an empty variable of a shell script is a common cause")
    if kind is Path and any(len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in Path(value).parts):
        raise ValueError(f"must be a path of names of at most {MAX_NAME_BYTES} bytes, got {_short(value)}")
    if kind is Path and is_circular(value):
        raise ValueError(f"must not lead in a circle of symbolic links, got {_short(value)}")
    try:
        parsed = kind(value)
    except ValueError:
        noun = {int: "an integer", float: "a number"}[kind]
        raise ValueError(f"must be {noun}, got {_short(value)}") from None
    if kind is float and not is_finite(parsed):
        raise ValueError(f"must be a finite number, got {_short(value)}")
    if kind is int and not -(2**63) <= parsed < 2**63:
        raise ValueError(f"must be an integer of at most 64 bits, got {_short(value)}")
    return parsed


def is_circular(path: str) -> bool:
    """Tell whether a path leads in a circle of symbolic links."""
    try:
        Path(path).stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def is_finite(value: float) -> bool:
    """Tell whether float32, in which everything is computed, can hold the number."""
    return abs(value) <= _LARGEST_FLOAT32


def _short(value: str) -> str:
    return repr(value if len(value) <= 80 else f"{value[:77]}...")


def _parse_bool(value: str) -> bool:
    if value.lower() in TRUE_WORDS:
        return True
    if value.lower() in FALSE_WORDS:
        return False
    raise ValueError(f"takes no value, or true or false; got {value!r}")


def _parse_json_object(value: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(value, object_pairs_hook=named_once)
    except RecursionError:
        raise ValueError(f"must be a JSON object, got {_short(value)} (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"must be a JSON object, got {_short(value)} ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"must be a JSON object like '{{\"key\": 1}}', got {_short(value)}")
    return parsed


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; a ValueError names a key that stands in it twice, because one of the two values would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it names the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return values


def format_value(value: Any) -> list[str]:
    """Return the words that `parse_value` reads back as `value`."""
    if isinstance(value, tuple):
        return [str(item) for item in value]
    if isinstance(value, Mapping):
        return [json.dumps(dict(value))]
    return [str(value)]


def yaml_words(value: Any) -> tuple[str, ...]:
    """Return the command-line words of a value in a YAML file."""
    if isinstance(value, list):
        return tuple(str(item) for item in value)
    if isinstance(value, Mapping):
        return (json.dumps(value),)
    if isinstance(value, bool):
        return (str(value).lower(),)
    return (str(value),)
