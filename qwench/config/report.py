"""What `--dry-run` shows: the configuration by section."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qwench.config.command_line.flags import flag_name, flag_table
from qwench.config.config import Config
from qwench.config.values import format_value

_SECRET_FLAGS = frozenset({"wandb-key"})


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
            Setting(flag=f"--{flag_name(item.name)}", value=_text(item.name, value), is_default=value == default)
            for item in fields(values)
            for value in [getattr(values, item.name)]
            for default in [table[flag_name(item.name)].default if flag_name(item.name) in table else ()]
        ]
    return shown


def flag_values(config: Config) -> dict[str, str]:
    """Return every flag with its value as text; secrets are left out."""
    settings = (setting for section in settings_by_section(config).values() for setting in section)
    return {setting.flag: setting.value for setting in settings if setting.flag.removeprefix("--") not in _SECRET_FLAGS}


def _text(field_name: str, value: object) -> str:
    if flag_name(field_name) in _SECRET_FLAGS and value is not None:
        return "(not shown)"
    return " ".join(format_value(value)) or "-"
