"""Checks of single values, shared by the sections; each raises a `ConfigError` that quotes the flag the user typed."""

from __future__ import annotations

from qwench.config.values import is_circular, is_finite
from qwench.errors import ConfigError
from qwench.files import fill_rollout_id
from qwench.plugins import is_function_path

MAX_PORT = 65_535
_LARGE_ROLLOUT_ID = 9_999_999
_LONGEST_S = 1e8
"""Three years. Timers of the operating system, of PyTorch and of its collectives count what is longer in too few bits."""


def flag_name(field_name: str) -> str:
    """Return max-tokens-per-gpu for max_tokens_per_gpu."""
    return field_name.replace("_", "-")


def as_flag(field_name: str) -> str:
    """Return --max-tokens-per-gpu for max_tokens_per_gpu."""
    return f"--{flag_name(field_name)}"


def check_positive(flag: str, value: float | None) -> None:
    """Refuse a value that is given and not a finite number above 0."""
    if value is not None and not value > 0:
        raise ConfigError(f"{flag} must be greater than 0, got {value}")
    check_finite(flag, value)


def check_seconds(flag: str, value: float | None) -> None:
    """Refuse a time that is given and not above 0, or too long for a timer."""
    check_positive(flag, value)
    if value is not None and value > _LONGEST_S:
        raise ConfigError(f"{flag} must be at most {_LONGEST_S:g} seconds, got {value}")


def check_path_template(flag: str, template: str | None) -> None:
    """Refuse a file or folder whose own folder cannot be reached, and a template that no rollout's number fits into."""
    if template is not None and is_circular(template.partition("{")[0] or "."):
        raise ConfigError(f"{flag} must not lead in a circle of symbolic links, got {template!r}")
    if template is not None:
        fill_rollout_id(template, _LARGE_ROLLOUT_ID, flag=flag)


def check_not_negative(flag: str, value: float | None) -> None:
    """Refuse a value that is given and not a finite number from 0 on."""
    if value is not None and not value >= 0:
        raise ConfigError(f"{flag} must not be negative, got {value}")
    check_finite(flag, value)


def check_finite(flag: str, value: float | None) -> None:
    """Refuse a value that is given and that no computation could use."""
    if value is not None and not is_finite(value):
        raise ConfigError(f"{flag} must be a finite number, got {value}")


def check_fraction(flag: str, value: float | None) -> None:
    """Refuse a value that is given and not in (0, 1]."""
    if value is not None and not 0 < value <= 1:
        raise ConfigError(f"{flag} must be greater than 0 and at most 1, got {value}")


def check_top_k(flag: str, value: int | None) -> None:
    """Refuse a top-k that is neither -1 (off) nor at least 1."""
    if value is not None and value != -1 and value < 1:
        raise ConfigError(f"{flag} must be at least 1, or -1 for off, got {value}")


def check_import_path(flag: str, value: str | None) -> None:
    """Refuse anything but `package.module.name` or `file.py:name`; launch finds out whether it loads, before any model does."""
    if value is not None and not is_function_path(value):
        raise ConfigError(
            f"{flag} must be the import path of a function like my_package.my_module.my_function, or a file and a function "
            f"like ./my_file.py:my_function; got {value!r}"
        )


def check_address(flag: str, value: str) -> None:
    """Refuse anything but `host:port`, with or without `http://`; an IPv6 address stands in brackets."""
    host, colon, port = value.removeprefix("http://").rstrip("/").rpartition(":")
    bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not (host and colon and port.isdecimal()) or bare_ipv6:
        raise ConfigError(f"{flag} must be host:port ([host]:port for IPv6), got {value!r}")
