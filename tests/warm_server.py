"""The process that tests fork Python processes from, see `tests.warm_start`. It has one thread and computes nothing."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import pickle
import runpy
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
import torch

from tests import warm_start
from tests.fakes import cuda_stand_in
from tests.warm_start import MESSAGE_BYTES, Reborn, Request

_PRELOADED = (
    "qwench.launch.build",
    "qwench.commands.train",
    "qwench.cluster.rank_host",
    "qwench.engines.embedded.http.serving",
    "tests.contract.train_backend_ranks",
    "tests.e2e.dying_run",
    "pytest",
)
_NESTING = "tests.forked_call"
"""A process that runs this gets a server too, for those that it starts."""
_HIGH = 512
_MAX_DESCRIPTORS = 16
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_IMPORT_PATH = sys.path[1:]
"""That of Python itself; the first one is the repository."""

Begun = tuple[Request, Sequence[int]]


def main(descriptor: int) -> NoReturn:
    """Import, then fork until the connection closes. In a forked process: run its module to the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _PRELOADED:
            import_module(name)
    warm_start.install()
    gc.freeze()  # a collection in a forked process leaves these objects alone, and their memory shared
    begun = _serve(socket.socket(fileno=descriptor))
    while True:
        module = _become(*begun)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if module == _NESTING and os.fork() == 0:
            begun = _serve(_only(theirs))
            continue
        theirs.close()
        warm_start.WARM.use(ours if module == _NESTING else None)
        try:
            _run(module)
        except Reborn as reborn:
            begun = reborn.request, reborn.descriptors


def _run(module: str) -> NoReturn:
    """Run the module and end the process."""
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except Exception:  # noqa: BLE001 - the border of the process
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
        code = 1
    warm_start.end_process(code or 0)


def _serve(connection: socket.socket) -> Begun:
    """Fork at each request; return in the forked process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.clear()
    _rename([sys.executable, "-m", "tests.warm_server"], {})
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, _MAX_DESCRIPTORS)
        if not message:
            os._exit(0)
        threads = warm_start.other_threads()
        assert not threads, f"a forked process would lack these threads, and keep the locks that they hold: {threads}"
        reader, writer = os.pipe()
        # Its parent, this process, is not the starter. The process between them ends, and the starter adopts the child.
        between = os.fork()
        if between == 0:
            between = os.getpid()
            child = os.fork()
            if child != 0:
                os.write(writer, str(child).encode())
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            connection.detach()
            return pickle.loads(message), descriptors
        os.waitpid(between, 0)
        connection.send(os.read(reader, 64))
        for number in (reader, writer, *descriptors):
            os.close(number)


def _only(connection: socket.socket) -> socket.socket:
    """Make this fork of a process a server: it ends with the process and holds nothing of it but the connection."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    own = connection.detach()
    os.closerange(3, own)
    os.closerange(own + 1, _HIGH)
    return socket.socket(fileno=own)


def _become(request: Request, descriptors: Sequence[int]) -> str:
    """Make this process what the request asks for; return the module to run."""
    if request.new_session:
        os.setsid()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _take(descriptors, request.descriptors)
    os.environ.clear()
    _rename([sys.executable, *request.arguments], request.environ)
    os.environ.update(request.environ)
    os.chdir(request.folder)
    given = [folder for folder in request.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    words = list(request.arguments)
    is_safe = "-P" in words[: words.index("-m")]
    sys.path[:] = [*([] if is_safe else [request.folder]), *given, *_IMPORT_PATH]
    sys.argv[:] = words[words.index("-m") :]
    module = sys.argv.pop(1)
    sys.modules.pop(module, None)  # a process that was exec'd runs it once, too
    torch.set_num_threads(int(request.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    np.random.seed()
    if str(cuda_stand_in.SITE_FOLDER) in given:
        cuda_stand_in.install()
    return module


def _take(descriptors: Sequence[int], numbers: Sequence[int]) -> None:
    """Give the descriptors their numbers, and close all others."""
    above = max(_HIGH, *numbers) + 1
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in descriptors]
    os.closerange(3, above)
    for number, descriptor in zip(numbers, aside, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # New streams: the old ones know whether what they had before could seek.
    sys.stdin = sys.__stdin__ = _stream(0, "r", sys.__stdin__)
    sys.stdout = sys.__stdout__ = _stream(1, "w", sys.__stdout__)
    sys.stderr = sys.__stderr__ = _stream(2, "w", sys.__stderr__)


def _stream(number: int, mode: str, like: TextIO | None) -> TextIO:
    assert like is not None, "Python has opened it"
    by_line = 1 if number == 2 or os.isatty(number) else -1
    return open(number, mode, buffering=by_line, encoding=like.encoding, errors=like.errors, closefd=False)


def _rename(words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Write the arguments and the environment where `/proc` shows them. No variable of this process may be there any more."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    pairs = [f"{name}={text}" for name, text in environ.items()]
    for texts, begin, end in ((words, *fields[45:47]), (pairs, *fields[47:49])):
        size = int(end) - int(begin)
        shown = "\0".join(texts).encode(errors="surrogateescape")[: size - 1]
        ctypes.memmove(int(begin), shown.ljust(size, b"\0"), size)
