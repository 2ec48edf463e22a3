"""Python processes that tests start are forked from a process that has imported the heavy libraries.

A rank or an engine server imports for four seconds before it does anything, and tests start hundreds of them. `Popen` of one
of `MODULES` is answered by a fork instead of an exec:

    starter ---request (arguments, environment, file descriptors)---> `tests.warm_server`, a child of the starter
       |                                                                    | fork
       `--- signals, waits for and reaps its own child, as always <--- the new process, handed over to the starter

The new process has its own id, session, environment, arguments, working folder and file descriptors, also in `/proc`. It
differs from a process that was exec'd in what `sys.modules` holds. `cold_starts` gives a test the exec.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MODULES = ("qwench.cluster.rank_process", "tests.forked_call")
_TETHER = "qwench.engines.fleet.tether"
_LIGHT = ("qwench.launch.trial_import", "qwench.foreign.declared_flags")
"""These import what a user's module imports: they are forked where there is a server already."""
REPOSITORY = Path(__file__).parents[1]
MESSAGE_BYTES = 2**17
_PADDING_BYTES = 2**15
WITHOUT_THREADS = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Keep the libraries from starting threads as they are imported: a fork copies no thread, and what one held stays as it was."""
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37  # linux/prctl.h
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from tests.warm_server import main; main(int(sys.argv[2]))"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One process to start."""

    arguments: Sequence[str]
    """Those of Python: `[-P] [-u] -m MODULE ...`; output is buffered in any case."""
    environ: Mapping[str, str]
    folder: str
    new_session: bool
    descriptors: Sequence[int]
    """The number that each descriptor sent along has in the new process."""


class Reborn(BaseException):
    """Raised in a process that its starter forked itself, so that it leaves the starter's frames."""

    def __init__(self, request: Request, descriptors: Sequence[int]) -> None:
        super().__init__()
        self.request, self.descriptors = request, descriptors


class WarmStarts:
    """How this process starts others."""

    def __init__(self) -> None:
        self.are_wanted = False
        self._may_start_server = True
        self._lock = threading.Lock()
        self._server: socket.socket | None = None

    def use(self, server: socket.socket | None) -> None:
        """Ask this server from now on; None: fork only what this process can fork itself."""
        self.are_wanted, self._may_start_server, self._server = True, False, server

    def start(self, request: Request, descriptors: Sequence[int]) -> int | None:
        """Return the id of the new child of this process; None: there is no server."""
        with self._lock, _adopting_orphans():
            if self._server is None and self._may_start_server and not set(_LIGHT) & set(request.arguments):
                self._server = _start_server()
            if self._server is None:
                return None
            try:
                socket.send_fds(self._server, [pickle.dumps(request)], descriptors)
                answer = self._server.recv(64)
            except OSError:
                return None
        return int(answer) if answer else None


WARM = WarmStarts()
_exec_child: Callable[..., None] = subprocess.Popen._execute_child  # type: ignore[attr-defined]  # private, replaced below


def install() -> None:
    """Have `Popen` of this process start `MODULES` by a fork. On other systems than Linux and beside GPUs it execs."""
    if sys.platform == "linux" and not Path("/dev/nvidiactl").exists():  # CUDA does not survive a fork
        WARM.are_wanted = True
        subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]


@contextmanager
def cold_starts() -> Iterator[None]:
    """Exec inside the block, as on a user's machine."""
    before, WARM.are_wanted = WARM.are_wanted, False
    try:
        yield
    finally:
        WARM.are_wanted = before


def end_process(code: int) -> NoReturn:
    """End a forked process as the interpreter does, but for the seconds in which that would take the modules apart."""
    threading._shutdown()  # type: ignore[attr-defined]  # joins the threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def _execute_child(
    self: subprocess.Popen[Any], args: Any, executable: Any, preexec_fn: Callable[[], object] | None, close_fds: bool,
    pass_fds: Sequence[int], cwd: Any, env: Any, startupinfo: Any, creationflags: int, shell: bool,
    p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int, *rest: Any,
) -> None:  # fmt: skip
    """Stand for `Popen._execute_child`; `rest` ends with start_new_session and process_group."""
    pid = None
    if WARM.are_wanted and _is_known(args) and close_fds and not shell:
        given = {0: p2cread, 1: c2pwrite, 2: errwrite} | {number: number for number in pass_fds}
        descriptors = {number: ours if ours != -1 else number for number, ours in given.items()}
        request = Request(
            arguments=[os.fspath(word) for word in args[1:]],
            environ=dict(os.environ if env is None else env),
            folder=os.fspath(cwd or Path.cwd()),
            new_session=bool(rest[-2]),
            descriptors=list(descriptors),
        )
        if preexec_fn is None:
            pid = WARM.start(request, list(descriptors.values()))
        elif not other_threads():
            pid = _fork(request, list(descriptors.values()), preexec_fn)
    ends = (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
    if pid is None:
        _exec_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                    *ends, *rest)  # fmt: skip
        return
    self.pid, self._child_created = pid, True  # type: ignore[attr-defined]  # as the original does
    self._close_pipe_fds(*ends)  # type: ignore[attr-defined]


def other_threads() -> list[str]:
    """Return the names of the threads of this process besides the calling one, on Linux those of native code too."""
    if sys.platform != "linux":
        return [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if int(task.name) != threading.get_native_id():
                names.append((task / "comm").read_text().strip())
    return names


def _is_known(args: object) -> bool:
    if not isinstance(args, list | tuple) or not args or args[0] != sys.executable:
        return False
    words = list(itertools.dropwhile(("-P", "-u").__contains__, args[1:]))
    serves = "qwench" in words and "serve" in words
    return words[:1] == ["-m"] and (words[1] in (*MODULES, *_LIGHT) or (words[1] in ("qwench", _TETHER) and serves))


def _fork(request: Request, descriptors: Sequence[int], prepare: Callable[[], object]) -> int:
    """Fork this process, which has one thread."""
    pid = os.fork()
    if pid == 0:
        kept = [os.dup(number) for number in descriptors]  # `Popen` closes its own when the exception leaves it
        prepare()
        raise Reborn(request, kept)
    return pid


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Make a descendant whose parent ends inside the block a child of this process."""
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def _start_server() -> socket.socket:
    """Start the server that imports. The padding is room for the arguments and the environment of its children."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environ = kept | WITHOUT_THREADS | {"PADDING": "x" * _PADDING_BYTES}
    with theirs:
        words = [str(REPOSITORY), str(theirs.fileno()), "x" * _PADDING_BYTES]
        subprocess.Popen([sys.executable, "-P", "-c", _PROGRAM, *words], env=environ, pass_fds=[theirs.fileno()],
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
    return ours
