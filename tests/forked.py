"""Processes that are forked from a server which has loaded the heavy libraries: they start at once, and hold nothing of a test.

`python -m qwench` loads for five seconds. What a test wants of a process of its own is mostly that it is another one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from qwench import cli
from tests.deadlines import patient

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["qwench.launch.build", "tests.contract.train_backend_ranks", "tests.e2e.dying_run"])
REPOSITORY = Path(__file__).parents[1]
DEADLINE_S = patient(240)


@dataclass(frozen=True)
class Finished:
    """What a process came to: its exit code (minus a signal) and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Forked:
    """A call in a process of its own, with its output in files."""

    def __init__(
        self, folder: Path, call: Callable[..., object], *arguments: Any, environ: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._process: BaseProcess = CONTEXT.Process(
            target=_run, args=(self._out, self._err, dict(environ or {}), call, arguments)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Return the process id."""
        assert self._process.pid is not None
        return self._process.pid

    def runs(self) -> bool:
        """Tell whether it has not ended."""
        return self._process.exitcode is None

    def end(self, *, timeout_s: float = DEADLINE_S) -> Finished:
        """Wait for its end; a process that is late is killed, and the test fails."""
        self._process.join(timeout_s)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
        said = self._out.read_text(), self._err.read_text()
        assert code is not None, f"not done within {timeout_s} s: {said}"
        return Finished(code, *said)


def fork_qwench(folder: Path, words: Sequence[str], *, environ: Mapping[str, str] | None = None) -> Forked:
    """Start `qwench WORDS`."""
    return Forked(folder, cli.main, list(words), environ=environ)


def fork_script(folder: Path, words: Sequence[str], *, environ: Mapping[str, str] | None = None) -> Forked:
    """Start `python SCRIPT WORDS`."""
    return Forked(folder, _run_script, list(words), environ=environ)


def ranks_environ(world_size: int) -> list[dict[str, str]]:
    """Return the variables by which torchrun tells each of its ranks its place."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return [{**address, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _run_script(words: list[str]) -> None:
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")


def _run(out: Path, err: Path, environ: dict[str, str], call: Callable[..., object], arguments: Sequence[Any]) -> None:
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    for number in (signal.SIGHUP, signal.SIGINT):  # the tests may run under nohup, or in the background
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
    os.environ |= environ
    os.chdir(REPOSITORY)
    torch.set_num_threads(1)
    call(*arguments)
