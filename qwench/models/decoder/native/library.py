"""The library of the C++ kernels: compiled for this processor when first used, and kept for later processes.

    ~/.cache/qwench/kernels-<hash of sources, compiler and processor>.so        a SHA-256 of its bytes follows them

The compilation takes some seconds. A file that is not used for a month is removed when another is kept.
Without a compiler the engine computes with PyTorch's operations.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from ctypes import CDLL, c_float, c_int, c_long, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from qwench.models.decoder.native.compiler import COMPILERS, compile_library, facts_of, find_compilers
from qwench.models.decoder.native.recording import current

_DIGEST_BYTES = 32
_KEPT_DAYS = 30
_FOLDER = Path(__file__).parent
DTYPES = (torch.float32, torch.bfloat16)
"""Of tensors that the kernels take."""
_LETTERS = {"p": c_void_p, "l": c_long, "f": c_float, "i": c_int}
_logger = logging.getLogger(__name__)


@cache
def library() -> CDLL | None:
    """Return the loaded library; None, and one line in the log, where it cannot be compiled or loaded."""
    failures = []
    for compiler in find_compilers():
        try:
            loaded = _load(compiler)
        except (OSError, subprocess.SubprocessError) as cause:
            failures.append(f"{compiler}: {getattr(cause, 'stderr', None) or cause}")
            continue
        if failures:
            _logger.warning("C++ kernels of the engine: %s compiles them, another compiler failed: %s", compiler, failures[0])
        return loaded
    if failures:
        said = "; ".join(failures)
        _logger.warning("C++ kernels of the engine cannot be compiled, it decodes with PyTorch's operations: %s", said)
    else:
        _logger.info("no C++ compiler (%s): the engine decodes with PyTorch's operations, more slowly", " or ".join(COMPILERS))
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
    texts = [path.read_text(encoding="ascii") for path in (*sources, *sorted(_FOLDER.glob("*.h")))]
    key = hashlib.sha256("\0".join((*texts, *facts_of(compiler))).encode()).hexdigest()[:16]
    with suppress(OSError, RuntimeError):  # the user has no home, or the library is not there yet, or damaged
        return _load_kept(_place(key))
    with tempfile.TemporaryDirectory(prefix="qwench-kernels-") as folder:
        built = compile_library(compiler, sources, Path(folder))
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
    _remove_unused(kept.parent)


def _remove_unused(folder: Path) -> None:
    """Remove libraries of other versions, compilers and processors that no process has loaded for long."""
    for path in folder.glob("kernels-*.so"):
        with suppress(OSError):  # another user's, or another process removes it now
            if path.stat().st_mtime < time.time() - _KEPT_DAYS * 86400:
                path.unlink()


def _load_kept(kept: Path) -> CDLL:
    """Load a library that is whole: of half a one, say after a crash of the machine, the process would die (SIGBUS)."""
    content = kept.read_bytes()
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        raise OSError(f"{kept} is damaged")
    with suppress(OSError):  # the file is another user's, or the disk is read-only
        kept.touch()  # the last use, for `_remove_unused`
    return CDLL(str(kept))
