"""From command-line words to values: each known flag once, parsed.

    --lr 1e-5 --no_colocate --lr=1e-6 --sglang-page-size 1
        -> flags:     {lr: 1e-6, colocate: False, embedded-page-size: 1}
           sglang:    {page-size: ("1",)}

Order of precedence, lowest first: the verb's defaults, `--config FILE.yaml`, the command line; in each the last wins.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwench.config.command_line import compat
from qwench.config.command_line.flags import Flag
from qwench.config.command_line.vocabulary import advise
from qwench.config.values import yaml_words
from qwench.errors import ConfigError

_CLOSE = 0.75
"""Least likeness of a flag that is offered instead: below, the resemblance is of letters, not of meaning."""
SGLANG_PREFIX = "sglang-"
ROUTER_PREFIX = "router-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Occurrence:
    """A flag as it was given once."""

    name: str
    """In lower dashes, without the leading ones."""
    values: tuple[str, ...]
    origin: str = ""
    """Name of the file it stands in; empty for the command line."""

    def error(self, problem: str) -> ConfigError:
        """Return the user's mistake, with the place where it was made."""
        return ConfigError(f"{self.origin}: {problem}" if self.origin else problem)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What was given, sorted by where it goes."""

    flags: dict[str, Any] = field(default_factory=dict)  # Any: of the type that the flag's annotation names
    sglang: dict[str, tuple[str, ...]] = field(default_factory=dict)
    router: dict[str, tuple[str, ...]] = field(default_factory=dict)


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
    """Read the flags of `--config FILE.yaml`, a mapping of flag names to values."""
    if len(config_flag.values) != 1:
        raise ConfigError(f"--config expects one YAML file, got {' '.join(config_flag.values) or 'none'}")
    path = Path(config_flag.values[0])
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must map flag names to values, like `lr: 1e-6`")
    return [
        Occurrence(name=str(key).replace("_", "-"), values=yaml_words(value), origin=str(path))
        for key, value in content.items()
    ]


def sort_flags(occurrences: Iterable[Occurrence], table: Mapping[str, Flag], *, prog: str = "qwench train") -> Given:
    """Give every occurrence its fate: a field's flag, passed through, accepted as neutral, or refused."""
    given = Given()
    for item in _expand_shorthands(occurrences):
        flag, values = _find_flag(item, table)
        if flag is not None:
            given.flags[flag.name] = _parsed(item, flag, values)
        elif item.name.startswith(SGLANG_PREFIX) and "rollout-engine" in table:
            given.sglang[item.name.removeprefix(SGLANG_PREFIX)] = item.values
        elif item.name.startswith(ROUTER_PREFIX) and "rollout-engine" in table:
            given.router[item.name.removeprefix(ROUTER_PREFIX)] = item.values
        else:
            _accept_neutral(item, table, prog)
    _apply_embedded_aliases(given, table)
    return given


def _expand_shorthands(occurrences: Iterable[Occurrence]) -> Iterable[Occurrence]:
    """Put what a shorthand stands for before everything else, so that the flags themselves win over it."""
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


def _parsed(item: Occurrence, flag: Flag, values: tuple[str, ...]) -> Any:  # as Given.flags
    for value in values:
        if value in compat.REFUSED_VALUES.get(flag.name, {}):
            raise item.error(f"--{item.name} {value} is not supported; use {compat.REFUSED_VALUES[flag.name][value]}")
    try:
        if flag.name.endswith("-path"):
            values = tuple(compat.our_import_path(path) for path in values)
        return flag.parse(values)
    except ValueError as error:
        raise item.error(f"--{item.name} {error}") from None


def _accept_neutral(item: Occurrence, table: Mapping[str, Flag], prog: str) -> None:
    """Accept a flag that has one harmless value at that value; refuse it otherwise, and every flag that is not known."""
    neutral = compat.neutral_flag(item.name) if "rollout-engine" in table else None
    if neutral is None:
        raise item.error(f"unknown flag --{item.name}; {_hint(item.name, prog, table)}")
    if not neutral.accepts(item.name, item.values):
        raise item.error(neutral.refusal(item.name, item.values))


def _unexpected(word: str, prog: str, table: Mapping[str, Flag]) -> str:
    """Say what to write instead of a word in front of the first flag, such as verl's `data.train_batch_size=32` or `-lr`."""
    key = word.partition("=")[0]
    hint = "" if "/" in key else advise(key, prog=prog, offered=_offered(table)) or ""
    return f"unexpected argument {word!r}; settings are given as --flag value{hint and f'; {hint}'}"


def _hint(name: str, prog: str, table: Mapping[str, Flag]) -> str:
    """Return what serves a word of other tools, or the flag that is spelled most like it; never one that is refused."""
    offered = _offered(table)
    advice = advise(name, prog=prog, offered=offered)
    if advice is not None:
        return advice
    close = difflib.get_close_matches(name, offered, n=1, cutoff=_CLOSE)
    return f"did you mean --{close[0]}?" if close else f"see {prog.partition(' FILE')[0].partition(' OWNER')[0]} --help"


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
