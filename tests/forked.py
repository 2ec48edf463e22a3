"""Calls in processes of their own, which start at once (`tests.warm_start`) and hold nothing of a test."""

from __future__ import annotations

import os
import pickle
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwench import cli
from tests.deadlines import patient

REPOSITORY = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
DEADLINE_S = patient(240)
Result = TypeVar("Result")


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
        self._out, self._err, file = folder / "stdout", folder / "stderr", folder / "call"
        file.write_bytes(pickle.dumps((call, arguments)))
        words = [sys.executable, "-m", "tests.forked_call", str(file)]
        whole = os.environ | ONE_THREAD | dict(environ or {})
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self._process = subprocess.Popen(words, env=whole, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def runs(self) -> bool:
        """Tell whether it has not ended."""
        return self._process.poll() is None

    def first_line(self) -> str:
        """Wait until it has said a line, and return that."""
        deadline = time.monotonic() + DEADLINE_S
        while "\n" not in (said := self._out.read_text()):
            assert self.runs(), self.end().stderr
            assert time.monotonic() < deadline, f"nothing said within {DEADLINE_S} s"
            time.sleep(0.02)
        return said.partition("\n")[0]

    def kill(self) -> None:
        """End it by SIGKILL, if it runs."""
        self._process.kill()
        self._process.wait()

    def end(self, *, timeout_s: float = DEADLINE_S) -> Finished:
        """Wait for its end; a process that is late is killed, and the test fails."""
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout_s)
        if code is None:
            self.kill()
        said = self._out.read_text(), self._err.read_text()
        assert code is not None, f"not done within {timeout_s} s: {said}"
        return Finished(code, *said)


def fork_qwench(folder: Path, words: Sequence[str], *, environ: Mapping[str, str] | None = None) -> Forked:
    """Start `qwench WORDS`."""
    return Forked(folder, cli.main, list(words), environ=environ)


def fork_script(folder: Path, words: Sequence[str], *, environ: Mapping[str, str] | None = None) -> Forked:
    """Start `python SCRIPT WORDS`."""
    return Forked(folder, _run_script, list(words), environ=environ)


def call_apart(folder: Path, call: Callable[..., Result], *arguments: Any, timeout_s: float) -> Result:
    """Return what the call returns in a process of its own."""
    file = folder / "result"
    ended = Forked(folder, _write_result, file, call, arguments).end(timeout_s=timeout_s)
    assert ended.returncode == 0, ended.stderr
    return pickle.loads(file.read_bytes())


def _write_result(file: Path, call: Callable[..., object], arguments: Sequence[Any]) -> None:
    file.write_bytes(pickle.dumps(call(*arguments)))


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
