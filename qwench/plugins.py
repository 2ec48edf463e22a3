"""The user's own functions, named on the command line: `package.module.function` or `./file.py:function`.

A module is looked for where Python looks, and last in the working folder, so that a user's `random.py` shadows nothing. A file
is loaded by its path; modules beside it can be imported too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from qwench.errors import ConfigError, QwenchError

_logger = logging.getLogger(__name__)
Function = Callable[..., Any]  # the user's own; each caller says what it passes and checks what it gets
_PACKAGE = str(Path(__file__).parent)
_STANDARD_LIBRARY = str(Path(inspect.__file__).parent)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')


def is_function_path(path: str) -> bool:
    """Tell whether a text has the form of a function's path."""
    file, colon, name = path.rpartition(":")
    if colon:
        return file.endswith(".py") and name.isidentifier()
    parts = path.split(".")
    return len(parts) >= 2 and all(part.isidentifier() for part in parts)


def load_function(path: str, *, flag: str, num_arguments: int = 1, called_as: str = "fn(samples)") -> Function:
    """Load a function and check that it can be called with `num_arguments` positional arguments.

    Args:
        flag: The flag that named it, for messages.
        called_as: How it is called, for messages.

    Raises:
        ConfigError: it cannot be loaded, or has another signature.
    """
    function = load_object(path, flag=flag)
    if not callable(function):
        raise ConfigError(f"{flag} {path!r} is no function but a {type(function).__name__}.")
    check_signature(function, path, flag=flag, num_arguments=num_arguments, called_as=called_as)
    if _takes_anything(function):
        _logger.warning(
            "%s %r at %s takes any arguments, so its signature cannot be checked; it is called as %s",
            flag, path, place_of(function), called_as,
        )  # fmt: skip
    loaded: Function = function
    return loaded


def check_signature(function: Function, path: str, *, flag: str, num_arguments: int, called_as: str) -> None:
    """Check that a function can be called with `num_arguments` positional arguments; compiled code tells no signature.

    Raises:
        ConfigError: it cannot.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError as error:
        raise ConfigError(f"{flag} {path!r} has the signature {signature}, but is called as {called_as}.") from error


def load_object(path: str, *, flag: str = "") -> Any:  # the user's own function, class or value
    """Load what `package.module.name` or `file.py:name` names.

    Raises:
        ConfigError: it cannot be loaded.
    """
    file, colon, name = path.rpartition(":")
    module_name, _, name = ("", "", name) if colon else path.rpartition(".")
    try:
        module = _module_of_file(Path(file)) if colon else _module(module_name)
        if hasattr(module, name):
            return getattr(module, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's module runs here, and may raise anything
        place = raised_at(error)
        described = f"{type(error).__name__}: {error}" + (f", at {place}" if place else "")
        raise ConfigError(
            f"{flag} {path!r} cannot be imported ({described}); a module must lie in the working folder or on PYTHONPATH, "
            "and a file is named as ./file.py:function."
        ) from error
    own = [
        key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__ and key[0] != "_"
    ]
    raise ConfigError(f"{flag} {path!r}: {file or module_name} has no {name!r}; it defines: {', '.join(own) or 'nothing'}")


def guarded(function: Function, *, path: str, flag: str) -> Function:
    """Return a function whose errors are one line with the flag, the error and its place."""

    def failure(error: BaseException) -> QwenchError:
        place = raised_at(error) or place_of(function)
        return QwenchError(f"{flag} {path!r} failed: {type(error).__name__}: {error} ({place})")

    @functools.wraps(function)
    async def call_async(*arguments: Any, **named: Any) -> Any:
        try:
            return await function(*arguments, **named)
        except QwenchError:
            raise
        except (Exception, SystemExit) as error:
            raise failure(error) from error

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except QwenchError:
            raise
        except (Exception, SystemExit) as error:
            raise failure(error) from error

    return call_async if inspect.iscoroutinefunction(function) else call


def _takes_anything(function: Function) -> bool:
    """Tell whether a function names none of its positional arguments: `(*args, **kwargs)`, or compiled code."""
    try:
        kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    except ValueError:
        return True
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Parameter.VAR_POSITIONAL in kinds and not any(kind in named for kind in kinds)


def place_of(function: Function) -> str:
    """Return the file and line where a function is defined."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "a file that is not Python" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def raised_at(error: BaseException) -> str | None:
    """Return file and line of the user's code where an error was raised; None: it was raised outside of it."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((_PACKAGE, _STANDARD_LIBRARY, "<"))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def place_in_stack(output: str) -> str | None:
    """Return the innermost frame of the user's code in a stack that faulthandler wrote."""
    for frame in _FRAME.finditer(output):
        if not frame["file"].startswith((_PACKAGE, _STANDARD_LIBRARY, "<")):
            return f"{frame['file']}:{frame['line']} in {frame['name']}"
    return None


def is_loaded(path: str) -> bool:
    """Tell whether the module of a function's path was imported by this process."""
    file, colon, _ = path.rpartition(":")
    return (_name_of_file(Path(file).expanduser().resolve()) if colon else path.rpartition(".")[0]) in sys.modules


def _module(name: str) -> ModuleType:
    _add_folder(Path.cwd())
    return importlib.import_module(name)


def _module_of_file(file: Path) -> ModuleType:
    """Load a file under a unique module name. Two flags that name the same file get the same module."""
    path = file.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = _name_of_file(path)
    if name in sys.modules:
        return sys.modules[name]
    _add_folder(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _name_of_file(path: Path) -> str:
    return f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _add_folder(folder: Path) -> None:
    """Add a folder to the end of the search path."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
