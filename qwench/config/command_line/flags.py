"""The table of flags, read from the fields of configuration dataclasses.

field `max_tokens_per_gpu: int | None` -> flag `--max-tokens-per-gpu INT`
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, get_args, get_type_hints

from qwench.config.limits import flag_name
from qwench.config.values import parse_value, takes_many

NOT_FLAGS = frozenset({"sglang_args", "router_args", "declared_args", "unused_flags", "overridden_flags", "engine_reason"})
"""Fields that collect other flags, or say why one was chosen. They have no flag."""


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

    @property
    def negation(self) -> str | None:
        """Name that switches it off, where that is offered: no-colocate, but nothing for no-load-optim."""
        return f"no-{self.name}" if self.is_switch and not self.name.startswith("no-") else None

    def parse(self, values: Sequence[str]) -> Any:
        """Return what `values` spell, or raise ValueError with what was expected."""
        if not takes_many(self.annotation) and len(values) != 1:
            join = f"; join them: {','.join(values)}" if values and "separated by commas" in self.help else ""
            raise ValueError(f"expects one value, got {' '.join(values) or 'none'}{join}")
        return parse_value(self.annotation, values)


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
    for statement, following in pairwise(body.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(following, ast.Expr):
            text = following.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                texts[statement.target.id] = " ".join(text.value.split())
    return texts
