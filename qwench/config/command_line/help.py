"""The texts of `qwench VERB --help`, `--help SECTION`, `--help FLAG`, `--help WORD` and `--help-all`.

The first page of a large verb holds what is required, a command to start from and the flags that most runs set; the sections
follow by name. A small verb shows all its flags at once.
"""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise

from qwench.config.command_line.flags import Flag
from qwench.config.command_line.verb_help import PAGES, Page
from qwench.config.values import choices, format_value, metavar
from qwench.errors import ConfigError

_INDENT = " " * 8
_COLUMN = 36
"""Where the meaning of a flag begins on the first page."""
_NARROWEST, _WIDEST = 60, 120
_FEW_FLAGS = 16
HELP, HELP_ALL = ("-h", "--help"), "--help-all"


def is_help(words: Sequence[str]) -> bool:
    """Tell whether a command line asks for help."""
    return any(word in (*HELP, HELP_ALL) for word in words)


def help_text(
    prog: str,
    table: Mapping[str, Flag],
    defaults: Mapping[str, tuple[str, ...]],
    *,
    words: Sequence[str] = (),
    subjects: Mapping[str, str] | None = None,
    width: int | None = None,
) -> str:
    """Return what the words of a command line ask for.

    Args:
        defaults: flag -> the words that this verb sets, where they are not the flag's own default.
        words: the command line; the word behind --help names a section or a flag, or is searched in the flags.
        subjects: section -> what it is about.
        width: columns. None: those of the terminal.

    Raises:
        ConfigError: nothing has the word behind --help.
    """
    width = width or min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    sections = {name: tuple(flags) for name, flags in groupby(table.values(), key=lambda flag: flag.section)}
    topic = help_topic(words)
    if topic is not None:
        return "\n".join(_about(topic, prog, table, sections, defaults, width)) + "\n"
    page = PAGES.get(prog, Page())
    lines = [f"usage: {prog} [FLAGS]", *_introduction(page)]
    if HELP_ALL in words or len(table) < _FEW_FLAGS:
        lines += ["", "Also --flag=value, and --config FILE.yaml. The last one wins."]
        lines += _all(sections, defaults, width)
    else:
        lines += _first_page(page, table, width)
        lines += _section_list(page, sections, subjects or {}, width)
    return "\n".join(lines) + "\n"


def help_topic(words: Sequence[str]) -> str | None:
    """Return the word behind --help, unless it is another flag."""
    for word, following in pairwise(words):
        if word in HELP and not following.startswith("-h") and not following.startswith("--help"):
            return following.lstrip("-").replace("_", "-")
    return None


def _about(
    topic: str,
    prog: str,
    table: Mapping[str, Flag],
    sections: Mapping[str, Sequence[Flag]],
    defaults: Mapping[str, tuple[str, ...]],
    width: int,
) -> Iterator[str]:
    if topic in sections:
        yield from _all({topic: sections[topic]}, defaults, width)
    elif topic in table:
        yield from _described(table[topic], defaults, width)
    elif mentions := [flag for flag in table.values() if topic.lower().replace("-", " ") in _searched(flag)]:
        yield f"flags that mention {topic!r}   (--help FLAG tells more)"
        for flag in mentions:
            yield from _row(flag, first_sentence(flag.help), width)
    else:
        close = difflib.get_close_matches(topic, [*sections, *table], n=1)
        hint = f"did you mean {close[0]}?" if close else f"sections: {', '.join(name for name in sections if name)}"
        raise ConfigError(f"{prog} has no section, no flag and no text on {topic!r}; {hint}")


def _searched(flag: Flag) -> str:
    """Return name, choices and meaning of a flag as words to search in."""
    return " ".join([flag.name, *choices(flag.annotation), flag.help]).lower().replace("-", " ")


def _introduction(page: Page) -> Iterator[str]:
    if page.summary:
        yield f"\n{page.summary}"
    if page.example:
        yield "\na typical command"
        yield textwrap.indent(page.example, "  ")


def _first_page(page: Page, table: Mapping[str, Flag], width: int) -> Iterator[str]:
    for heading, names in (("required", page.required), ("often used", page.common)):
        if names:
            yield f"\n{heading}"
        for name in names:
            meaning = page.meanings.get(name) or first_sentence(table[name].help)
            yield from _row(table[name], f"{meaning} {page.alternatives.get(name, '')}".strip(), width)


def _section_list(page: Page, sections: Mapping[str, Sequence[Flag]], subjects: Mapping[str, str], width: int) -> Iterator[str]:
    yield f"\nsections   (--help SECTION, FLAG or WORD tells more, {HELP_ALL} tells all)"
    for name, flags in sections.items():
        if name not in page.unread:
            yield from _columns(f"  {name} ({len(flags)})", subjects.get(name, ""), width)
    if page.unread:
        yield from textwrap.wrap(f"  for qwench train: {', '.join(page.unread)}", width, subsequent_indent="    ")


def _row(flag: Flag, meaning: str, width: int) -> Iterator[str]:
    """Yield the name of a flag and its meaning."""
    value = "" if flag.is_switch else " " + metavar(flag.annotation)
    spelled = f"  --{flag.name}{value}"
    if len(spelled) >= _COLUMN:
        spelled = f"  --{flag.name} {'NAME' if choices(flag.annotation) else value.strip()}".rstrip()
    yield from _columns(spelled, meaning, width)


def _columns(left: str, right: str, width: int) -> Iterator[str]:
    lines = textwrap.wrap(right, width - _COLUMN, break_on_hyphens=False) or [""]
    if len(left) >= _COLUMN:
        yield left
    else:
        yield f"{left:<{_COLUMN}}{lines.pop(0)}".rstrip()
    yield from (" " * _COLUMN + line for line in lines)


def _all(sections: Mapping[str, Iterable[Flag]], defaults: Mapping[str, tuple[str, ...]], width: int) -> Iterator[str]:
    for name, flags in sections.items():
        yield f"\n{name or 'flags'}"
        for flag in flags:
            yield from _described(flag, defaults, width)


def _described(flag: Flag, defaults: Mapping[str, tuple[str, ...]], width: int) -> Iterator[str]:
    spelled, meaning = f"  {_spelling(flag)}", flag.help
    if len(spelled) > width:
        spelled, meaning = f"  --{flag.name} NAME", f"One of {', '.join(choices(flag.annotation))}. {meaning}"
    yield spelled
    text = f"{meaning} {_default(flag, defaults)}".strip()
    yield textwrap.fill(text, width, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False)


def first_sentence(text: str) -> str:
    """Return a text up to its first full stop that ends a sentence."""
    sentence, stop, _ = text.partition(". ")
    return sentence + "." if stop else text


def _spelling(flag: Flag) -> str:
    if flag.is_switch:
        return f"--{flag.name}" + (f", --{flag.negation}" if flag.negation is not None else "")
    return f"--{flag.name} {metavar(flag.annotation)}"


def _default(flag: Flag, defaults: Mapping[str, tuple[str, ...]]) -> str:
    if flag.required:
        return "(required)"
    words = " ".join(defaults.get(flag.name) or format_value(flag.default))
    return f"(default: {words})" if words else ""
