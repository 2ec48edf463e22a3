"""The library of the C++ kernels: compiled for this processor when first used, and kept for later processes.

    ~/.cache/qwench/kernels-<hash of sources, compiler and processor>.so        a SHA-256 of its bytes follows them

The compilation takes some seconds. Without a compiler the engine computes with PyTorch's operations.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import CDLL, c_float, c_int, c_long, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from qwench.models.decoder.native.recording import current

COMPILERS = ("g++", "clang++")
# No fast-math: not-a-number must stay one.
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC")
_TIMEOUT_S = 300
_DIGEST_BYTES = 32
_FOLDER = Path(__file__).parent
DTYPES = (torch.float32, torch.bfloat16)
"""Of tensors that the kernels take."""
_LETTERS = {"p": c_void_p, "l": c_long, "f": c_float, "i": c_int}
_logger = logging.getLogger(__name__)


def find_compiler() -> str | None:
    """Return the path of the C++ compiler, if one is installed."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


@cache
def library() -> CDLL | None:
    """Return the loaded library; None, and one line in the log, where it cannot be compiled or loaded."""
    compiler = find_compiler()
    if compiler is None:
        _logger.info("no C++ compiler (%s): the engine decodes with PyTorch's operations, more slowly", " or ".join(COMPILERS))
        return None
    try:
        return _load(compiler)
    except (OSError, subprocess.SubprocessError) as cause:
        said = getattr(cause, "stderr", None) or cause
        _logger.warning("C++ kernels of the engine cannot be compiled, it decodes with PyTorch's operations: %s", said)
        return None


class Kernel:
    """A function of the library, which must be there when it is first called; one for each dtype of its tensors."""

    def __init__(self, name: str, arguments: str) -> None:
        """`arguments`: a letter each: p pointer, l long, i int, f float."""
        self._name = name
        self._types: list[Any] = [_LETTERS[letter] for letter in arguments]  # typeshed names no class of them all
        self._functions: dict[torch.dtype, Callable[..., None]] = {}

    def of(self, dtype: torch.dtype) -> Callable[..., None]:
        """Return the function for tensors of one of DTYPES; a recording of this thread notes the calls."""
        if dtype not in self._functions:
            loaded = library()
            assert loaded is not None, "the caller has asked for it"
            function = loaded[f"{self._name}_{str(dtype).removeprefix('torch.')}"]
            function.argtypes = self._types
            function.restype = None
            self._functions[dtype] = function
        recording = current()
        return self._functions[dtype] if recording is None else partial(recording.call, self._functions[dtype])


def threads_for(work: int, *, smallest: int) -> int:
    """Return how many threads share `work`: one where it is below `smallest`."""
    return torch.get_num_threads() if work >= smallest else 1


def _load(compiler: str) -> CDLL:
    sources = sorted(_FOLDER.glob("*.cpp"))
    version = _run([compiler, "--version"], _FOLDER)
    texts = [path.read_text(encoding="ascii") for path in (*sources, *sorted(_FOLDER.glob("*.h")))]
    key = hashlib.sha256("\0".join((*texts, *_OPTIONS, version, _processor())).encode()).hexdigest()[:16]
    with suppress(OSError, RuntimeError):  # the user has no home, or the library is not there yet, or damaged
        return _load_kept(_place(key))
    with tempfile.TemporaryDirectory(prefix="qwench-kernels-") as folder:
        built = _compile(compiler, sources, Path(folder))
        with suppress(OSError, RuntimeError):  # no home to keep it in: this process alone has the library
            _keep(built, _place(key))
            return _load_kept(_place(key))
        return CDLL(str(built))


def _place(key: str) -> Path:
    return Path("~/.cache/qwench").expanduser() / f"kernels-{key}.so"


def _keep(built: Path, kept: Path) -> None:
    """Copy the library at once: other processes see it whole or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as beside:
        copy = Path(shutil.copy(built, beside))
        with copy.open("ab") as file:
            file.write(hashlib.sha256(built.read_bytes()).digest())
        copy.replace(kept)


def _load_kept(kept: Path) -> CDLL:
    """Load a library that is whole: of half a one, say after a crash of the machine, the process would die (SIGBUS)."""
    content = kept.read_bytes()
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        raise OSError(f"{kept} is damaged")
    return CDLL(str(kept))


def _compile(compiler: str, sources: Sequence[Path], folder: Path) -> Path:
    # Linked without an OpenMP library, see threads.h.
    _run([compiler, *_OPTIONS, "-c", *map(str, sources)], folder)
    _run([compiler, "-shared", "-o", "kernels.so", *(path.with_suffix(".o").name for path in sources)], folder)
    return folder / "kernels.so"


def _run(command: Sequence[str], folder: Path) -> str:
    """Run the compiler in a folder and return what it prints."""
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", check=True, timeout=_TIMEOUT_S
    ).stdout


def _processor() -> str:
    """Return what `-march=native` depends on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="ascii", errors="replace").splitlines() if path.exists() else []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kinds)])
