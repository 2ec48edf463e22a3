"""The text of `qwench VERB --help`: every flag by section, with its value, meaning and default."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from itertools import groupby

from qwench.config.command_line.flags import Flag
from qwench.config.values import format_value, metavar

_INDENT = 8
_NARROWEST, _WIDEST = 60, 120


def help_text(prog: str, table: Mapping[str, Flag], defaults: Mapping[str, tuple[str, ...]]) -> str:
    """Return the page.

    Args:
        defaults: flag -> the words that this verb sets, where they are not the flag's own default.
    """
    return "\n".join(_lines(prog, table, defaults)) + "\n"


def _lines(prog: str, table: Mapping[str, Flag], defaults: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    yield f"usage: {prog} [FLAGS]\n"
    yield "Flags may also be given as --flag=value and in --config FILE.yaml. The last one wins."
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    for section, flags in groupby(table.values(), key=lambda flag: flag.section):
        yield f"\n{section or 'flags'}"
        for flag in flags:
            yield f"  {_spelling(flag)}"
            meaning = f"{flag.help} {_default(flag, defaults)}".strip()
            yield textwrap.fill(meaning, width, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)


def _spelling(flag: Flag) -> str:
    if flag.is_switch:
        return f"--{flag.name}, --no-{flag.name}"
    return f"--{flag.name} {metavar(flag.annotation)}"


def _default(flag: Flag, defaults: Mapping[str, tuple[str, ...]]) -> str:
    if flag.required:
        return "(required)"
    words = " ".join(defaults.get(flag.name) or format_value(flag.default))
    return f"(default: {words})" if words else ""
