"""The C++ compiler of the kernels: which are installed, and what is asked of them. Imports without torch."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("g++", "clang++")
# No fast-math: not-a-number must stay one.
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC")
_TIMEOUT_S = 300
_CPU_INFO = Path("/proc/cpuinfo")


def find_compilers() -> list[str]:
    """Return the paths of the C++ compilers that are installed, the first choice first."""
    return [path for name in COMPILERS if (path := shutil.which(name))]


def facts_of(compiler: str) -> tuple[str, ...]:
    """Return what a compiled library depends on besides its sources."""
    return (*_OPTIONS, _run([compiler, "--version"]), _processor())


def compile_library(compiler: str, sources: Sequence[Path], folder: Path) -> Path:
    """Compile sources to a library in a folder and return its path.

    Raises:
        OSError, subprocess.SubprocessError: the compiler cannot run, fails (`stderr` of the error), or takes too long.
    """
    # Linked without an OpenMP library, see threads.h.
    _run([compiler, *_OPTIONS, "-c", *map(str, sources)], folder)
    _run([compiler, "-shared", "-o", "kernels.so", *(path.with_suffix(".o").name for path in sources)], folder)
    return folder / "kernels.so"


def _run(command: Sequence[str], folder: Path | None = None) -> str:
    """Run the compiler, in a folder or where this process is, and return what it prints."""
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", check=True, timeout=_TIMEOUT_S
    ).stdout


def _processor() -> str:
    """Return what `-march=native` depends on."""
    lines = _CPU_INFO.read_text(encoding="ascii", errors="replace").splitlines() if _CPU_INFO.exists() else []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kinds)])
