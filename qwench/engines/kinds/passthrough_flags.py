"""Flags that pass through to another program: whether the installed program takes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from qwench.errors import ConfigError

CHECK_TIMEOUT_S = 180.0
_PREAMBLE = """
import argparse, sys
parser = argparse.ArgumentParser(prog="flags", allow_abbrev=False)
"""
_EPILOGUE = """
parser.parse_args(sys.argv[1:])
"""
_NOT_INSTALLED = 3


def check_words(words: Sequence[str], *, prefix: str, parser_program: str, package: str) -> None:
    """Check the flags with the parser of the installed package, in another process: an import takes seconds and GPU memory.

    Args:
        parser_program: Python lines that import the package and add its flags to `parser`.

    Raises:
        ConfigError: the package is not installed, or does not take the flags.
    """
    guarded = "try:\n" + "".join(f"    {line}\n" for line in parser_program.strip().splitlines())
    program = (
        f"{_PREAMBLE}{guarded}except ImportError as error:\n    print(error, file=sys.stderr)\n    sys.exit(3)\n{_EPILOGUE}"
    )
    try:
        finished = subprocess.run(
            [sys.executable, "-P", "-c", program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as cause:
        raise ConfigError(f"{package} did not read its flags within {CHECK_TIMEOUT_S:g} s; is it installed well?") from cause
    if finished.returncode == 0:
        return
    last = (finished.stderr.strip().splitlines() or ["(no message)"])[-1]
    if finished.returncode == _NOT_INSTALLED:
        raise ConfigError(f"{package} cannot be imported ({last}); install it: pip install 'qwench[sglang]'")
    problem = last.removeprefix("flags: error: ").replace("--", f"--{prefix}-")
    raise ConfigError(f"the installed {package} does not take the --{prefix}-* flags: {problem}")
