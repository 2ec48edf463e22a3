"""Server processes of engines: start until healthy, watch, end exactly what was started.

    new --start--> starting --/health answers 200--> running --stop, or its death--> ended --start--> ...

A server keeps its address over restarts.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qwench.config.environment import without_rank
from qwench.engines.client import HEALTH_TIMEOUT_S
from qwench.errors import ConfigError, EngineError, cannot_listen
from qwench.files import written
from qwench.observability.processes import STACKS_SIGNAL, ask_for_stacks
from qwench.wire.addresses import Placement, http_url, listen, unused_port

HEALTH_POLL_S = 0.2
LAST_HEALTH_TIMEOUT_S = 2.0
"""Of a look at the deadline or after it: a launched server may be ready long before `start` is called."""
STOP_TIMEOUT_S = 10.0
COLLECT_TIMEOUT_S = 2.0
_END_POLL_S = 0.05
LOG_TAIL_LINES = 20
_SECRET = re.compile(r"(^|_)((API_?KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS)(_|$)|KEY$)", re.IGNORECASE)


class Server(Protocol):
    """One engine's server, on this machine or another one. All methods block; any thread may call them."""

    @property
    def label(self) -> str:
        """Return its name in messages."""
        ...

    @property
    def placement(self) -> Placement | None:
        """Return the machine and the devices its weights lie on; None: not known."""
        ...

    def launch(self) -> None:
        """Start its processes and return at once; `start` then waits for them.

        Raises:
            EngineError: it cannot be started.
        """
        ...

    def check_start(self) -> None:
        """Check, without waiting, that a launched server has not ended while it starts.

        Raises:
            EngineError: it has.
        """
        ...

    def start(self) -> str:
        """Start or restart it unless it was launched, and return its base URL once it can generate.

        Raises:
            EngineError: it died, or was not ready within its deadline, which counts from its launch.
        """
        ...

    def stop(self) -> None:
        """End all its processes; no effect when there is none."""
        ...

    def is_running(self) -> bool:
        """Tell whether its process is alive."""
        ...

    def last_output(self) -> str:
        """Return a phrase with the end of its log."""
        ...

    def stacks(self) -> str:
        """Return the stacks of its threads, or why there are none."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCommand:
    """How to start one server; picklable, so that it can be started on another machine."""

    label: str
    argv: tuple[str, ...]
    """Without `--host` and `--port`."""
    environ: Mapping[str, str]
    """The whole environment of the process."""
    log_file: Path
    """Takes standard output and standard error; a restart appends."""
    private_files: Mapping[Path, str] = field(default_factory=dict)
    """Files that only this user may read, such as a token: all users see command lines. Deleted with the server."""
    host: str = "127.0.0.1"
    """Address that it listens on and is reached at."""
    port: int | None = None
    """None: one that is free at the first start."""
    start_timeout_s: float
    dumps_stacks: bool = False
    """All its processes write their stacks to the log on `observability.processes.STACKS_SIGNAL`, instead of ending."""


class CommandMaker(Protocol):
    """Makes one server's command on the machine where the server will run; picklable."""

    def __call__(self, *, gpu_ids: Sequence[int], environ: Mapping[str, str], host: str) -> ServerCommand:
        """Return the command.

        Args:
            gpu_ids: the engine's GPUs, counted among those that `environ` shows; empty on a CPU.
            environ: of the process that starts the server.
            host: address that the server listens on and is reached at.
        """
        ...


class ServerProcess:
    """See `Server`. Its processes end when this process does, also when it is killed (`engines.fleet.tether`)."""

    def __init__(self, command: ServerCommand, *, placement: Placement | None = None) -> None:
        self._command = command
        self._placement = placement
        self._port = command.port
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = 0.0
        """When it must be ready: `start_timeout_s` after its launch."""
        self._lock = threading.Lock()
        """Guards the fields; never held while waiting."""

    def __repr__(self) -> str:
        return f"ServerProcess({self._command.label})"

    @property
    def label(self) -> str:
        """See `Server.label`."""
        return self._command.label

    @property
    def placement(self) -> Placement | None:
        """See `Server.placement`."""
        return self._placement

    @property
    def process_group(self) -> int | None:
        """Return the id of the group that all its processes belong to; None while there are none."""
        return None if self._process is None else self._process.pid

    def start(self) -> str:
        """See `Server.start`."""
        if self._process is None:
            self.launch()
        return self.wait_until_healthy()

    def launch(self) -> None:
        """See `Server.launch`.

        Raises:
            EngineError: the port is taken.
            OutputError: there is no room for its log.
        """
        with self._lock:
            assert self._process is None, f"{self.label} runs already"
            self._port = _free_port(self.label, self._command.host, self._port)
            log_file = self._command.log_file
            with written(f"the log of {self.label}, {log_file},", log_file):
                log_file.parent.mkdir(parents=True, exist_ok=True)
                log_file.touch()
                for path, text in self._command.private_files.items():
                    _write_privately(path, text)
            address = ["--host", self._command.host, "--port", str(self._port)]
            argv = [sys.executable, "-P", "-m", "qwench.engines.fleet.tether", *self._command.argv, *address]
            self._deadline = time.monotonic() + self._command.start_timeout_s
            with log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    argv,
                    env=dict(self._command.environ),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def check_start(self) -> None:
        """See `Server.check_start`."""
        if not self.is_running():
            self.stop()
            raise EngineError(f"{self.label} ended while it started; {self.last_output()}")

    def wait_until_healthy(self) -> str:
        """Wait for `/health` to answer 200 and return the base URL.

        Raises:
            EngineError: see `Server.start`; nothing of it is left running then.
        """
        assert self._port is not None, "launch comes first"
        url = http_url(self._command.host, self._port)
        while not _is_healthy(
            url, timeout_s=max(min(HEALTH_TIMEOUT_S, self._deadline - time.monotonic()), LAST_HEALTH_TIMEOUT_S)
        ):
            self.check_start()
            if time.monotonic() > self._deadline:
                self.stop()
                raise EngineError(
                    f"{self.label} was not ready within {self._command.start_timeout_s:g} s; {self.last_output()}"
                )
            time.sleep(HEALTH_POLL_S)
        return url

    def is_running(self) -> bool:
        """See `Server.is_running`."""
        with self._lock:
            return self._process is not None and not _has_ended(self._process)

    def stacks(self) -> str:
        """See `Server.stacks`."""
        group = self.process_group
        if group is None or not self._command.dumps_stacks:
            return "(it is not running)" if group is None else "(it cannot be asked for them)"
        return ask_for_stacks(lambda: os.killpg(group, STACKS_SIGNAL), self._command.log_file)

    def stop(self) -> None:
        """See `Server.stop`."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        for path in self._command.private_files:
            path.unlink(missing_ok=True)
        # The leader is not reaped before the last signal, so its number cannot belong to another group.
        _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not _has_ended(process) and time.monotonic() < deadline:
            time.sleep(_END_POLL_S)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None, "the tether has a pipe"
        process.stdin.close()
        _wait_for_end_of_group(process.pid)

    def last_output(self) -> str:
        """See `Server.last_output`."""
        return f"the end of {self._command.log_file}: {tail(self._command.log_file)}"


def server_environ(environ: Mapping[str, str], **changes: str) -> dict[str, str]:
    """Return an environment for a server: `environ` without what makes a process a rank of the trainer, and with `changes`.

    Secrets of the run, such as WANDB_API_KEY, are left out too: a server answers requests from outside.
    """
    kept = {name: text for name, text in without_rank(environ).items() if not _SECRET.search(name)}
    return kept | changes


def visible_devices(gpu_ids: Sequence[int], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that show a process only these of the GPUs that we see; none when `gpu_ids` is empty."""
    if not gpu_ids:
        return {}
    name = next((one for one in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if environ.get(one)), "CUDA_VISIBLE_DEVICES")
    ours = environ[name].split(",") if environ.get(name) else [str(i) for i in range(max(gpu_ids) + 1)]
    if max(gpu_ids) >= len(ours):
        raise EngineError(
            f"an engine needs GPU {max(gpu_ids)} of this machine, but {name}={','.join(ours)}; ask for fewer GPUs."
        )
    return {name: ",".join(ours[i] for i in gpu_ids)}


def tail(path: Path, num_lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of a log, without those of requests that were answered."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    lines = [line for line in lines if not line.endswith('HTTP/1.1" 200 OK')]
    return "\n".join(lines[-num_lines:]) or "(empty)"


def check_port_is_free(label: str, host: str, port: int, *, flag: str | None = None) -> None:
    """Check that no process listens on a port.

    Raises:
        ConfigError: a process does, or the host is not an address of this machine; the user chose them with `flag`.
        EngineError: the same without a flag.
    """
    try:
        listen(host, port).close()
    except OSError as cause:
        error = EngineError if flag is None else ConfigError
        raise error(cannot_listen(label, host, port, cause, flag=flag)) from cause


def _write_privately(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _free_port(label: str, host: str, port: int | None) -> int:
    if port is not None:
        check_port_is_free(label, host, port)
        return port
    return unused_port(host)


def _is_healthy(url: str, *, timeout_s: float) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/health", timeout=timeout_s) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether a child has ended, and leave it to be reaped where the system can."""
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _wait_for_end_of_group(group: int) -> None:
    """Wait until killed processes have freed ports and GPU memory. Briefly: orphans may never be collected."""
    deadline = time.monotonic() + COLLECT_TIMEOUT_S
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(_END_POLL_S)
