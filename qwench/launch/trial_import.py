"""Import the user's modules in another process first: code that ends its process must not end a run without a word.

    driver: the paths that flags name -> child: writes a path, imports its module, writes the next path, ... writes "done"

An error at import is no matter here: the driver imports the module afterwards, and names error and place.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import NoReturn

from qwench.cluster.child import describe_end
from qwench.config.config import Config
from qwench.config.eval_sets import EvalSettings
from qwench.config.limits import as_flag
from qwench.errors import ConfigError
from qwench.observability.stopping import end_with_parent
from qwench.observability.waiting import waiting
from qwench.plugins import is_loaded, load_object, place_in_stack

_DONE = "done"
_OWN = "qwench."
IMPORT_TIMEOUT_S = 600.0
"""For the modules of all functions together; some load models."""


def check_imports(config: Config, sets: Sequence[EvalSettings] = ()) -> None:
    """Import the modules of all functions that the flags and evaluation sets name, each once, in another process.

    Raises:
        ConfigError: a module ended the process.
    """
    paths = {path: flag for flag, path in _function_paths(config, sets) if not path.startswith(_OWN) and not is_loaded(path)}
    if paths:
        _import_in_child(paths)


def _function_paths(config: Config, sets: Sequence[EvalSettings]) -> Iterator[tuple[str, str]]:
    """Yield each flag that names a function, with the path of the function."""
    for section in (*(getattr(config, item.name) for item in fields(config)), *sets):
        for name in (item.name for item in fields(section) if item.name.endswith("_path")):
            value = getattr(section, name)
            for path in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
                yield as_flag(name), path


def _import_in_child(flags: Mapping[str, str]) -> None:
    """Import what paths name, whose flags are given."""
    code, report, stacks = run_child("qwench.launch.trial_import", [*flags], named=", ".join(flags))
    path, place = (report.splitlines() or [""])[-1], place_in_stack(stacks)
    if path in flags:
        how = f"{describe_end(code)}, at {place}" if place else describe_end(code)
        raise ConfigError(f"{flags[path]} {path!r} cannot be imported: its module ends the process (it {how}).")


def run_child(program: str, arguments: Sequence[str], *, named: str) -> tuple[int, str, str]:
    """Run a module of ours that imports the user's; return its exit code, standard output and standard error.

    Processes that the user's modules have started end with it.

    Args:
        named: the functions whose modules it imports, for messages.

    Raises:
        ConfigError: it did not end in time.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as report, tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", program, *arguments],
            stdin=subprocess.DEVNULL, stdout=report, stderr=errors, start_new_session=True,
        )  # fmt: skip
        try:
            with waiting(f"import of {named}"):
                code = child.wait(IMPORT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"the modules of {named} were not imported within {IMPORT_TIMEOUT_S:g} s; move what lasts into the functions."
            ) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # processes that a module has started
            child.wait()
        report.seek(0)
        errors.seek(0)
        return code, report.read(), errors.read()


def main() -> None:
    """Import what the arguments name. Standard output tells how far it came, standard error holds a stack."""
    end_with_parent(os.getppid())
    report, stacks = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
    for output in (1, 2):  # what the modules print, the driver will print
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    faulthandler.enable(stacks, all_threads=False)
    end = os._exit

    def end_with_stack(status: int) -> NoReturn:
        faulthandler.dump_traceback(stacks, all_threads=False)
        end(status)

    os._exit = end_with_stack  # in this process, which does nothing else
    for path in sys.argv[1:]:
        print(path, file=report, flush=True)
        with suppress(BaseException):
            load_object(path)
    print(_DONE, file=report, flush=True)
    end(0)  # threads that a module has started would hold it


if __name__ == "__main__":
    main()
