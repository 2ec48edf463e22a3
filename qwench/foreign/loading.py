"""Load a user's function and tell whose convention it follows.

ours      fn(sample), fn(sample, context), fn(group) ...                typed, see `rollout.functions`
theirs    first parameter `args` | one parameter `input` | a class | takes anything and its module imports slime or miles
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Literal

from qwench.errors import ConfigError
from qwench.foreign.modules import keep_stand_ins, stand_ins
from qwench.foreign.sample import Foreign
from qwench.plugins import load_object

PluginApi = Literal["auto", "qwench", "slime", "miles"]
_IMPORTS_THEM = re.compile(r"^\s*(?:from|import)\s+(?:slime|miles)\b", re.MULTILINE)


def load(path: str, *, flag: str) -> Foreign:
    """Load what a flag names, with the stand-ins at hand.

    Raises:
        ConfigError: it cannot be loaded.
    """
    with stand_ins():
        loaded = load_object(path, flag=flag)
        if imports_them(loaded):
            keep_stand_ins()
    if not callable(loaded):
        raise ConfigError(f"{flag} {path!r} is no function but a {type(loaded).__name__}.")
    return loaded


def is_foreign(function: Callable[..., Foreign], api: PluginApi) -> bool:
    """Tell whether a function follows the convention of slime or miles."""
    if str(getattr(function, "__module__", "")).startswith("qwench."):
        return False  # a built-in one that the flag names
    if api != "auto":
        return api != "qwench"
    if inspect.isclass(function):
        return True
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if not named:
        return bool(parameters) and imports_them(function)
    return named[0].name == "args" or (len(named) == 1 and named[0].name == "input")


def takes(function: Callable[..., Foreign], name: str) -> bool:
    """Tell whether a function has a parameter of this name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of compiled code, which tells none
        return False
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def imports_them(function: Foreign) -> bool:
    """Tell whether the module of a function imports slime or miles, at its top or inside of functions."""
    module = inspect.getmodule(function)
    try:
        return module is not None and _IMPORTS_THEM.search(inspect.getsource(module)) is not None
    except (OSError, TypeError):
        return False
