"""From command-line words to values: each known flag once, parsed.

    --lr 1e-5 --no_colocate --lr=1e-6 --sglang-page-size 1
        -> flags:     {lr: 1e-6, colocate: False, embedded-page-size: 1}
           sglang:    {page-size: ("1",)}

Order of precedence, lowest first: the verb's defaults, `--config FILE.yaml`, the command line; in each the last wins.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from qwench.config.command_line import compat
from qwench.config.command_line.flags import Flag
from qwench.config.command_line.foreign_flag import NOT_SUPPORTED, ForeignFlag
from qwench.config.command_line.vocabulary import advise
from qwench.config.values import format_value, yaml_words
from qwench.config.yaml_file import read_yaml_file
from qwench.errors import ConfigError

_CLOSE = 0.75
"""Least likeness of a flag that is offered instead: below, the resemblance is of letters, not of meaning."""
_JOINED = 0.9
"""The same of all words joined."""
_MAX_BEGUN = 3
"""So many flags that begin with a name are offered instead."""
SGLANG_PREFIX = "sglang-"
ROUTER_PREFIX = "router-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Occurrence:
    """A flag as it was given once."""

    name: str
    """In lower dashes, without the leading ones."""
    values: tuple[str, ...]
    origin: str = ""
    """Name of the file that holds it; empty for the command line."""

    def error(self, problem: str) -> ConfigError:
        """Return the user's mistake, with the place where it was made."""
        return ConfigError(f"{self.origin}: {problem}" if self.origin else problem)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """The given flags, sorted by destination."""

    flags: dict[str, Any] = field(default_factory=dict)  # Any: of the type that the flag's annotation names
    sglang: dict[str, tuple[str, ...]] = field(default_factory=dict)
    router: dict[str, tuple[str, ...]] = field(default_factory=dict)
    declared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Flags that the user's functions declare."""
    unused: list[str] = field(default_factory=list)
    """Names of accepted flags that have no effect here; with the value where another value would have one."""
    overridden: list[str] = field(default_factory=list)
    """Flags with values that a later one of the same name replaces."""


def split_words(
    words: Sequence[str], *, prog: str = "qwench train", table: Mapping[str, Flag] | None = None
) -> list[Occurrence]:
    """Cut command-line words into flags with their values, and put the content of `--config FILE.yaml` in front.

    A flag begins with two dashes and a letter; everything up to the next flag is its value. `--flag=value` gives one value.
    """
    occurrences: list[Occurrence] = []
    for word in words:
        if word.startswith("--") and word[2:3].isalpha():
            name, equals, value = word[2:].partition("=")
            occurrences.append(Occurrence(name=name.replace("_", "-"), values=(value,) if equals else ()))
        elif occurrences:
            last = occurrences.pop()
            occurrences.append(Occurrence(name=last.name, values=(*last.values, word)))
        else:
            raise ConfigError(_unexpected(word, prog, table or {}))
    from_files = [entry for item in occurrences if item.name == "config" for entry in read_yaml(item)]
    return from_files + [item for item in occurrences if item.name != "config"]


def read_yaml(config_flag: Occurrence) -> list[Occurrence]:
    """Read the flags of `--config FILE.yaml`, a mapping of flag names to values.

    Raises:
        ConfigError: it cannot be read, or names a flag twice.
    """
    path, content = read_mapping(config_flag)
    named = [(str(key).replace("_", "-"), value) for key, value in content.items()]
    names = [name for name, _ in named]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"--{config_flag.name}: {path} names {twice} twice, spelled with - and with _")
    return [Occurrence(name=name, values=yaml_words(value), origin=str(path)) for name, value in named]


def read_mapping(config_flag: Occurrence) -> tuple[Path, dict[Any, Any]]:  # Any: YAML
    """Return the file that a flag names, and the mapping in it.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    flag = f"--{config_flag.name}"
    if len(config_flag.values) != 1:
        raise ConfigError(f"{flag} expects one YAML file, got {' '.join(config_flag.values) or 'none'}")
    path = Path(config_flag.values[0])
    try:
        content = read_yaml_file(path)
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{flag}: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{flag}: {path} must map flag names to values, like `lr: 1e-6`")
    return path, content


def custom_settings(occurrences: Sequence[Occurrence], table: Mapping[str, Flag]) -> list[Occurrence]:
    """Return the flags that --custom-config-path sets; its other keys belong to the args of custom functions.

    So do the settings of importance weights where the user's own function computes these.
    """
    files = [item for item in occurrences if item.name == "custom-config-path"] if "custom-config-path" in table else []
    entries = [_in_our_words(entry) for item in files for entry in read_yaml(item)]
    functions = [_in_our_words(item) for item in occurrences if item.name == "custom-tis-function-path"][-1:]
    of_function = any(
        one.name == "custom-tis-function-path" and not {*one.values} & {*compat.IMPORT_PATHS} for one in functions
    )
    return [
        entry
        for entry in entries
        if entry.name in table
        and entry.values != ("None",)
        and not (of_function and entry.name.startswith(("tis-", "rs-", "use-rs")))
    ]


def sort_flags(
    occurrences: Iterable[Occurrence],
    table: Mapping[str, Flag],
    *,
    prog: str = "qwench train",
    declared: Callable[[], Collection[str]] = frozenset,
) -> Given:
    """Give every occurrence its fate: a field's flag, passed through, accepted as neutral, or refused.

    Args:
        declared: names the flags that the user's functions declare; asked where a flag is unknown.
    """
    given = Given()
    to_compare: list[tuple[Occurrence, ForeignFlag]] = []
    refused: list[tuple[Occurrence, ForeignFlag]] = []
    taken: dict[str, str] = {}
    for item in map(_in_our_words, _expand_shorthands(occurrences)):
        flag, values = _find_flag(item, table)
        if flag is not None:
            given.flags[flag.name] = _parsed(item, flag, values, stray=partial(_stray, prog=prog, table=table))
            taken[flag.name] = " ".join(values)
        elif item.name in compat.FOREIGN_FLAGS or not _passes_through(item, given, table):
            foreign = compat.foreign_flag(item.name) if "rollout-engine" in table else None
            if foreign is None and item.name in declared():
                given.declared[item.name] = item.values
                continue
            if foreign is None:
                raise item.error(f"unknown flag --{item.name}; {_hint(item.name, prog, table)}")
            if not foreign.accepts(item.name, item.values):
                refused.append((item, foreign))
            elif foreign.told and item.name not in given.unused:
                given.unused.append(item.name)
            if foreign.same_as is not None and foreign.same_as in table:
                to_compare.append((item, foreign))
    if refused:
        raise _refusal(refused)
    if "sglang-router-ip" in given.unused:  # its port is that of another router
        given.router.pop("port", None)
    built_in = [(name, value) for name, value in taken.items() if compat.IMPORT_PATHS.get(value) == "None"]
    given.unused.extend(f"{name} {path} (the built-in is used)" for name, path in built_in)
    for item, foreign in to_compare:
        _check_same(item, foreign, given, table)
    _apply_embedded_aliases(given, table)
    return given


def overridden(occurrences: Iterable[Occurrence], table: Mapping[str, Flag]) -> list[str]:
    """Return each value of the command line that a later one of the same flag replaces, as `lr 1e-6`."""
    said = list[tuple[str, str]]()
    for item in map(_in_our_words, occurrences):
        if not item.origin:
            flag, values = _find_flag(item, table)
            said.append((item.name if flag is None else flag.name, " ".join(values)))
    last = dict(said)
    return [f"{name} {value}" for name, value in dict.fromkeys(said) if value != last[name]]


def _in_our_words(item: Occurrence) -> Occurrence:
    """Replace another name of a flag of ours, or of one of its values."""
    name, values = compat.ALIASES.get(item.name, item.name), item.values
    if len(values) == 1 and (name, values[0]) in compat.VALUE_ALIASES:
        name, value = compat.VALUE_ALIASES[name, values[0]]
        values = (value,)
    if name == "eval-prompt-data" and len(values) == 1 and Path(values[0].partition("@[")[0]).suffix:
        values = (compat.NAME_OF_A_LONE_SET, *values)
    return replace(item, name=name, values=values)


def _passes_through(item: Occurrence, given: Given, table: Mapping[str, Flag]) -> bool:
    """Keep a flag of the SGLang server or its router under its own name; tell whether it is one."""
    for prefix, kept in ((SGLANG_PREFIX, given.sglang), (ROUTER_PREFIX, given.router)):
        if item.name.startswith(prefix) and "rollout-engine" in table:
            kept[item.name.removeprefix(prefix)] = item.values
            return True
    return False


def _expand_shorthands(occurrences: Iterable[Occurrence]) -> Iterable[Occurrence]:
    """Put the flags of a shorthand before all others, so that flags given by name win over it."""
    occurrences = list(occurrences)
    for item in occurrences:
        if item.name in compat.SHORTHANDS:
            if len(item.values) != 1:
                raise item.error(f"--{item.name} expects one value, got {' '.join(item.values) or 'none'}")
            for name, template in compat.SHORTHANDS[item.name].items():
                yield Occurrence(name=name, values=(template.replace("{value}", item.values[0]),), origin=item.origin)
    yield from (item for item in occurrences if item.name not in compat.SHORTHANDS)


def _find_flag(item: Occurrence, table: Mapping[str, Flag]) -> tuple[Flag | None, tuple[str, ...]]:
    """Find the field's flag, and turn the switches --flag and --no-flag into the values true and false."""
    flag, switched_on = table.get(item.name), True
    if flag is None and item.name.startswith("no-"):
        flag, switched_on = table.get(item.name.removeprefix("no-")), False
        flag = flag if flag is not None and flag.is_switch else None
    if flag is None or not flag.is_switch:
        return flag, item.values
    if not item.values:
        return flag, (str(switched_on).lower(),)
    if not switched_on:
        raise item.error(f"--{item.name} takes no value, got {' '.join(item.values)}")
    return flag, item.values


def _parsed(item: Occurrence, flag: Flag, values: tuple[str, ...], *, stray: Callable[[str], str]) -> Any:  # as Given.flags
    for value in values:
        if value in compat.REFUSED_VALUES.get(flag.name, {}):
            raise item.error(f"--{item.name} {value} is not supported; use {compat.REFUSED_VALUES[flag.name][value]}")
    try:
        if flag.name.endswith("-path"):
            values = tuple(compat.our_import_path(path) for path in values)
        return flag.parse(values)
    except ValueError as error:
        raise item.error(f"--{item.name} {error}{stray(values[1]) if len(values) > 1 else ''}") from None


def _stray(word: str, *, prog: str, table: Mapping[str, Flag]) -> str:
    """Return what to add where a flag got a second value that is no value, such as `-lr` or `trainer.save_freq=3`."""
    if not re.match(r"-+[a-z]|[a-z._]+=", word, re.IGNORECASE):
        return ""
    return f"; {_unexpected(word, prog, table)}"


def _refusal(refused: Sequence[tuple[Occurrence, ForeignFlag]]) -> ConfigError:
    """Explain one refused flag, rather one that is never supported than one not built yet, and name the others."""
    first, *others = sorted(refused, key=lambda pair: pair[1].fate != NOT_SUPPORTED)
    names = dict.fromkeys(f"--{item.name}" for item, _ in others if item.name != first[0].name)
    more = f" (refused too: {' '.join(names)})" if names else ""
    return first[0].error(first[1].refusal(first[0].name, first[0].values) + more)


def _check_same(item: Occurrence, foreign: ForeignFlag, given: Given, table: Mapping[str, Flag]) -> None:
    """Refuse a flag that must repeat the value of another one and does not."""
    ours = foreign.same_as
    assert ours is not None, "the caller asks"
    said = " ".join(format_value(given.flags.get(ours, table[ours].default)))
    got = " ".join(item.values)
    if given.flags.get(ours) if not item.values else Path(got).name == Path(said).name or _equal(got, said):
        return
    raise item.error(f"--{item.name} {got}".rstrip() + f" must repeat --{ours} ({said}): {foreign.reason}; leave it out")


def _equal(text: str, other: str) -> bool:
    try:
        return float(text) == float(other)
    except ValueError:
        return text == other


def _unexpected(word: str, prog: str, table: Mapping[str, Flag]) -> str:
    """Say what to write instead of a word in front of the first flag, such as verl's `data.train_batch_size=32` or `-lr`."""
    key = word.partition("=")[0]
    if "hf-checkpoint" in table and ("qwen" in key.lower() or Path(key).is_dir()):
        hint = "use --hf-checkpoint"
    else:
        hint = "" if "/" in key else advise(key, prog=prog, offered=_offered(table)) or ""
    return f"unexpected argument {word!r}; settings are given as --flag value{hint and f'; {hint}'}"


def _hint(name: str, prog: str, table: Mapping[str, Flag]) -> str:
    """Return what serves a word of other tools, or the flag that is spelled most like it; never one that is refused."""
    offered = _offered(table)
    advice = advise(name, prog=prog, offered=offered)
    if advice is not None:
        return advice
    begun = [flag for flag in (*offered, "help", "help-all") if flag.startswith(name)]
    close = [flag for flag in difflib.get_close_matches(name, [*offered, "help", "help-all"], n=5) if _is_typo(name, flag)][:1]
    meant = begun if 0 < len(begun) <= _MAX_BEGUN else close
    if meant:
        return f"did you mean {' or '.join(f'--{flag}' for flag in meant)}?"
    return f"see {prog.partition(' FILE')[0].partition(' OWNER')[0]} --help"


def _is_typo(name: str, flag: str) -> bool:
    """Tell whether a name is a flag with slips within its words, without dashes, or without `use`; not with another word."""
    given, ours = name.split("-"), flag.split("-")
    if len(given) == len(ours):
        return all(map(_is_slip, given, ours))
    return ours == ["use", *given] or _likeness("".join(given), "".join(ours)) >= _JOINED


def _is_slip(word: str, ours: str) -> bool:
    return word.startswith(ours) or ours.startswith(word) or _likeness(word, ours) >= _CLOSE


def _likeness(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def _offered(table: Mapping[str, Flag]) -> list[str]:
    """Return the flags that a hint may name."""
    shorthands = compat.SHORTHANDS if "rollout-engine" in table else {}
    return [name for name in (*table, *shorthands) if name not in compat.ONE_VALUE]


def _apply_embedded_aliases(given: Given, table: Mapping[str, Flag]) -> None:
    for sglang_name, name in compat.EMBEDDED_ALIASES.items():
        values = given.sglang.get(sglang_name)
        if values is None or name in given.flags:
            continue
        try:
            given.flags[name] = table[name].parse(values)
        except ValueError as error:
            raise ConfigError(f"--{SGLANG_PREFIX}{sglang_name} {error}") from None
