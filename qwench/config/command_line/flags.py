"""The table of flags, read from the fields of configuration dataclasses, and how their values are spelled.

field `max_tokens_per_gpu: int | None` -> flag `--max-tokens-per-gpu INT`
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NOT_FLAGS = frozenset({"sglang_args", "router_args"})
"""Fields that collect pass-through flags and have no flag of their own."""

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag and the field behind it."""

    name: str
    """Without the leading dashes: max-tokens-per-gpu."""
    section: str
    """Name of the section's field in the configuration; empty for a dataclass without sections."""
    annotation: Any  # a type expression: there is no closed type for it
    default: Any  # of the type the annotation names
    required: bool
    help: str

    @property
    def is_switch(self) -> bool:
        """Tell whether the flag is given without a value: --flag or --no-flag."""
        return bool in (self.annotation, *get_args(self.annotation))

    def parse(self, values: Sequence[str]) -> Any:
        """Return what `values` spell, or raise ValueError with what was expected."""
        if not takes_many(self.annotation) and len(values) != 1:
            raise ValueError(f"expects one value, got {' '.join(values) or 'none'}")
        return parse_value(self.annotation, values)


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
    try:
        return kind(value)
    except ValueError:
        noun = {int: "an integer", float: "a number"}[kind]
        raise ValueError(f"must be {noun}, got {value!r}") from None


def _parse_bool(value: str) -> bool:
    if value.lower() in TRUE_WORDS:
        return True
    if value.lower() in FALSE_WORDS:
        return False
    raise ValueError(f"takes no value, or true or false; got {value!r}")


def _parse_json_object(value: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be a JSON object, got {value!r} ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"must be a JSON object like '{{\"key\": 1}}', got {value!r}")
    return parsed


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


def flag_table(config_type: type) -> Mapping[str, Flag]:
    """Return flag name -> Flag for a dataclass of sections, or for a plain dataclass of fields."""
    return _flag_table(config_type)


@cache
def _flag_table(config_type: Any) -> Mapping[str, Flag]:
    flags: dict[str, Flag] = {}
    hints = get_type_hints(config_type)
    for item in fields(config_type):
        if is_dataclass(hints[item.name]):
            found = _flags_of(hints[item.name], section=item.name)
        else:
            found = [flag for flag in _flags_of(config_type, section="") if flag.name == flag_name(item.name)]
        for flag in found:
            assert flag.name not in flags, f"two sections have the flag --{flag.name}"
            flags[flag.name] = flag
    return flags


def flag_name(field_name: str) -> str:
    """Return max-tokens-per-gpu for max_tokens_per_gpu."""
    return field_name.replace("_", "-")


def _flags_of(section_type: Any, *, section: str) -> list[Flag]:
    hints, texts = get_type_hints(section_type), field_docstrings(section_type)
    return [
        Flag(
            name=flag_name(item.name),
            section=section,
            annotation=hints[item.name],
            default=item.default_factory() if item.default_factory is not MISSING else item.default,
            required=item.default is MISSING and item.default_factory is MISSING,
            help=texts.get(item.name, ""),
        )
        for item in fields(section_type)
        if item.name not in NOT_FLAGS
    ]


def field_docstrings(section_type: type) -> dict[str, str]:
    """Return field name -> the string literal under the field in the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section_type))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(following, ast.Expr):
            text = following.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                texts[statement.target.id] = " ".join(text.value.split())
    return texts
