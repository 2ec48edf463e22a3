"""The user's own functions, named on the command line as `package.module.function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from qwench.errors import ConfigError

Function = Callable[..., Any]  # the user's own; each caller says what it passes and checks what it gets


def load_function(path: str, *, flag: str, num_arguments: int = 1, called_as: str = "fn(samples)") -> Function:
    """Import a function and check that it can be called with `num_arguments` positional arguments.

    Args:
        flag: The flag that named it, for messages.
        called_as: How it is called, for messages.

    Raises:
        ConfigError: it cannot be imported, or has another signature.
    """
    module_name, _, name = path.rpartition(".")
    try:
        function: Function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{flag} {path!r} cannot be imported ({error}); is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise ConfigError(f"{flag} {path!r} is no function but a {type(function).__name__}.")
    try:
        inspect.signature(function).bind(*[None] * num_arguments)
    except TypeError as error:
        raise ConfigError(
            f"{flag} {path!r} has the signature {inspect.signature(function)}, but is called as {called_as}."
        ) from error
    return function
