"""The configuration as others see it: what `--dry-run` shows, and what is kept with a run. Secrets are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import yaml

from qwench.config.command_line.flags import flag_table
from qwench.config.config import Config
from qwench.config.limits import as_flag, flag_name
from qwench.config.values import format_value

CONFIG_FILE = "qwench_config.yaml"
"""In the folders of --save and --log-dir: the configuration of the last start."""
_HEADER = "# The configuration of this run, without secrets. `--config FILE` reads it.\n"
_SECRET_FLAGS = frozenset({"wandb-key"})
_SECRET_NAME = re.compile(r"(key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
"""Of environment variables, and of flags that are passed to engines and router."""
_CREDENTIALS = re.compile(r"//[^/@\s]+@")
_HIDDEN = "(not shown)"
_PASSED_THROUGH = {"sglang_args": "sglang-", "router_args": "router-", "declared_args": ""}
"""Field of words that are passed on -> how their flags begin."""
PARSER_SETTINGS = frozenset({"--engine-reason", "--unused-flags", "--overridden-flags"})
"""What the parser adds; no flag of a user, so neither a dry run shows it nor a checkpoint keeps it."""
_NOT_KEPT = PARSER_SETTINGS | {f"--{name}" for name in _SECRET_FLAGS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One flag and its value."""

    flag: str
    value: str
    is_default: bool


def settings_by_section(config: Config) -> dict[str, list[Setting]]:
    """Return section -> its settings, in order of definition."""
    table = flag_table(Config)
    shown: dict[str, list[Setting]] = {}
    for section in fields(config):
        values = getattr(config, section.name)
        shown[section.name] = [
            Setting(flag=as_flag(item.name), value=_text(item.name, value), is_default=value == default)
            for item in fields(values)
            for value in [getattr(values, item.name)]
            for default in [table[flag_name(item.name)].default if flag_name(item.name) in table else item.default]
        ]
    return shown


def as_typed(setting: Setting) -> str:
    """Return a setting as the command line has it; `--sglang-args --page-size 4` is `--sglang-page-size 4` there."""
    prefix = _PASSED_THROUGH.get(setting.flag[2:].replace("-", "_"))
    return f"{setting.flag} {setting.value}" if prefix is None else re.sub("(^| )--", rf"\1--{prefix}", setting.value)


def replaced_values(config: Config) -> list[str]:
    """Return each value that a later one of its flag replaces, as the command line has it; secrets are left out."""
    table, shown = flag_table(Config), list[str]()
    for given in config.foreign.overridden_flags:
        name, _, value = given.partition(" ")
        is_passed_on = name not in table
        is_mapping = value.startswith("{")  # of variables, for one
        hidden = is_mapping or name in _SECRET_FLAGS or (is_passed_on and _SECRET_NAME.search(name))
        shown.append(f"--{name} {_HIDDEN if hidden else without_secrets(value)}")
    return shown


def flag_values(config: Config) -> dict[str, str]:
    """Return every flag with its value as text; secrets are left out."""
    settings = (setting for section in settings_by_section(config).values() for setting in section)
    return {setting.flag: setting.value for setting in settings if setting.flag not in _NOT_KEPT}


def as_yaml(config: Config) -> str:
    """Return the configuration as a file that `--config` reads, without what is off and without secrets."""
    settings: dict[str, object] = {}
    for section in fields(config):
        values = getattr(config, section.name)
        for item in fields(values):
            value, name = getattr(values, item.name), flag_name(item.name)
            if item.name in _PASSED_THROUGH:
                settings |= _passed_through(_PASSED_THROUGH[item.name], value)
            elif value is not None and value not in ((), {}) and f"--{name}" not in _NOT_KEPT:
                settings[name] = _plain(without_secrets(value))
    return _HEADER + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def without_secrets(value: object) -> object:
    """Return a flag's value without passwords in addresses, and without the secrets of variables and passed words."""
    if isinstance(value, Mapping):
        return {name: _HIDDEN if _SECRET_NAME.search(str(name)) else without_secrets(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(
            _HIDDEN if str(word).startswith("--") and _SECRET_NAME.search(str(word)) else without_secrets(item)
            for word, item in pairwise(("", *value))
        )
    return _CREDENTIALS.sub(f"//{_HIDDEN}@", value) if isinstance(value, str) else value


def _passed_through(prefix: str, words: Sequence[str]) -> dict[str, object]:
    """Return `("--page-size", "4")` of SGLang as {"sglang-page-size": ["4"]}; secrets are left out."""
    flags: dict[str, object] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            flags[f"{prefix}{word[2:]}"] = values = []
        else:
            values.append(word)
    return {name: given for name, given in flags.items() if not _SECRET_NAME.search(name)}


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _text(field_name: str, value: object) -> str:
    if flag_name(field_name) in _SECRET_FLAGS and value is not None:
        return _HIDDEN
    return " ".join(format_value(without_secrets(value))) or "-"
