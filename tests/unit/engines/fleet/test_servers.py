"""Server processes: real ones, but small and quick to start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwench.engines.fleet import servers
from qwench.engines.fleet.servers import ServerCommand, ServerProcess, check_port_is_free, server_environ, tail, visible_devices
from qwench.errors import ConfigError, EngineError
from tests.deadlines import patient

DEADLINE_S = patient(30)

HEALTHY = """
import http.server, os, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *arguments):
        pass
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", os.getpid(), helper.pid, flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
SILENT = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
time.sleep(600)
"""
DYING = "print('no such model'); raise SystemExit(3)"


def command(folder: Path, program: str, **changes) -> ServerCommand:
    fields = {"label": "engine 0", "argv": (sys.executable, "-c", program), "environ": dict(os.environ)}
    return ServerCommand(**(fields | {"log_file": folder / "engine.log", "start_timeout_s": DEADLINE_S} | changes))


def pids(folder: Path) -> list[int]:
    """Return the pids that the server that was started last wrote to its log."""
    lines = [line for line in (folder / "engine.log").read_text().splitlines() if line.startswith("pids ")]
    return [int(word) for word in lines[-1].split()[1:]]


def wait_until(condition) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_starts_stops_with_all_its_processes_and_starts_again_at_its_address(tmp_path):
    folder = tmp_path / "logs" / "engines"
    server = ServerProcess(command(folder, HEALTHY))
    first = server.start()
    started = pids(folder)
    assert server.is_running() and all(map(is_alive, started))
    server.stop()
    server.stop()
    assert not server.is_running() and not any(map(is_alive, started))
    assert server.start() == first
    os.kill(pids(folder)[0], signal.SIGKILL)
    wait_until(lambda: not server.is_running())
    server.stop()
    assert not any(map(is_alive, pids(folder)))


def test_a_launched_server_is_not_started_twice(tmp_path):
    server = ServerProcess(command(tmp_path, HEALTHY))
    server.launch()
    launched = server.process_group
    assert server.start() and server.process_group == launched
    server.stop()


def test_the_deadline_of_a_launched_server_counts_from_its_launch(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(servers, "_is_healthy", lambda url, timeout_s: looks.append(timeout_s))
    server = ServerProcess(command(tmp_path, "import time; time.sleep(600)", start_timeout_s=0.5))
    server.launch()
    time.sleep(0.6)
    with pytest.raises(EngineError, match=r"engine 0 was not ready within 0\.5 s"):
        server.start()
    assert looks == [servers.LAST_HEALTH_TIMEOUT_S]
    assert not server.is_running()


def test_a_launched_server_that_is_ready_may_be_waited_for_after_its_deadline(tmp_path):
    server = ServerProcess(command(tmp_path, HEALTHY))
    server.launch()
    url = server.wait_until_healthy()
    server._deadline = time.monotonic() - 1
    assert server.start() == url
    server.stop()


def test_private_files_are_this_users_alone_and_last_as_long_as_the_server(tmp_path):
    private = tmp_path / "logs" / ".secrets.yaml"
    fields = {"log_file": tmp_path / "logs" / "engine.log", "private_files": {private: "token: x\n"}}
    server = ServerProcess(command(tmp_path, HEALTHY, **fields))
    private.parent.mkdir()
    private.write_text("left by a run that was killed, for all to read")
    for _ in range(2):
        server.start()
        assert private.read_text() == "token: x\n" and private.stat().st_mode & 0o777 == 0o600
        server.stop()
        assert not private.exists()


def test_a_server_that_dies_at_the_start_shows_the_end_of_its_log(tmp_path):
    server = ServerProcess(command(tmp_path, DYING))
    with pytest.raises(EngineError, match=r"(?s)engine 0 ended while it started.*no such model"):
        server.start()
    assert not server.is_running()


def test_a_server_that_accepts_and_never_answers_is_given_up_at_its_deadline(tmp_path):
    server = ServerProcess(command(tmp_path, SILENT, start_timeout_s=1.0))
    with pytest.raises(EngineError, match="engine 0 was not ready within 1 s"):
        server.start()
    assert not server.is_running()


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = rf"^engine 0 cannot listen on 127\.0\.0\.1 port {port} \(Address already in use.*\); "
        with pytest.raises(EngineError, match=f"{said}end what holds it"):
            ServerProcess(command(tmp_path, HEALTHY, port=port)).start()
        with pytest.raises(ConfigError, match=f"{said}choose another with --port"):
            check_port_is_free("engine 0", "127.0.0.1", port, flag="--port")
    if socket.has_dualstack_ipv6():
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(EngineError, match=rf"^engine 0 cannot listen on ::1 port {port} \(Address already in use"):
                check_port_is_free("engine 0", "::1", port)


def test_a_server_that_is_not_running_or_cannot_be_asked_has_no_stacks(tmp_path):
    server = ServerProcess(command(tmp_path, HEALTHY), placement="here")
    assert (server.stacks(), server.process_group, server.placement) == ("(it is not running)", None, "here")
    server._process = SimpleNamespace(pid=7)
    assert (server.stacks(), server.process_group) == ("(it cannot be asked for them)", 7)
    assert (repr(server), server.label) == ("ServerProcess(engine 0)", "engine 0")
    assert server.last_output() == f"the end of {tmp_path / 'engine.log'}: (empty)"


OWNER = """
import pathlib, sys, time
from tests.unit.engines.fleet.test_servers import HEALTHY, ServerProcess, command
ServerProcess(command(pathlib.Path(sys.argv[1]), HEALTHY)).start()
print("up", flush=True)
time.sleep(600)
"""


def test_a_server_ends_with_an_owner_that_was_killed(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "up\n"
        started = pids(tmp_path)
        assert all(map(is_alive, started))
    finally:
        owner.kill()
        owner.communicate()
    wait_until(lambda: not any(map(is_alive, started)))


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -KILL $$", 137)])
def test_a_tether_ends_with_the_exit_code_of_its_command(script, code):
    words = [sys.executable, "-m", "qwench.engines.fleet.tether", "sh", "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as tether:
        assert tether.wait(patient(60)) == code


def test_a_server_ends_with_a_tether_that_was_killed(tmp_path):
    server = ServerProcess(command(tmp_path, HEALTHY))
    server.start()
    leader, _ = pids(tmp_path)
    os.kill(server.process_group, signal.SIGKILL)
    wait_until(lambda: not is_alive(leader))
    server.stop()
    assert not any(map(is_alive, pids(tmp_path)))


def test_a_servers_environment_has_nothing_of_the_trainers_rank():
    ours = {
        "PATH": "/bin",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "TORCHELASTIC_RUN_ID": "x",
        "WANDB_API_KEY": "s",
    }
    assert server_environ(ours, QWENCH_TOKEN="t") == {"PATH": "/bin", "QWENCH_TOKEN": "t"}


@pytest.mark.parametrize(
    ("environ", "gpu_ids", "expected"),
    [
        ({}, [], {}),
        ({}, [2, 3], {"CUDA_VISIBLE_DEVICES": "2,3"}),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6"}, [0, 2], {"CUDA_VISIBLE_DEVICES": "4,6"}),
        ({"HIP_VISIBLE_DEVICES": "1,0"}, [0], {"HIP_VISIBLE_DEVICES": "1"}),
    ],
)
def test_gpus_are_counted_among_those_that_the_starter_sees(environ, gpu_ids, expected):
    assert visible_devices(gpu_ids, environ) == expected


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(
        EngineError, match=r"^an engine needs GPU 2 of this machine, but CUDA_VISIBLE_DEVICES=0,1; ask for fewer"
    ):
        visible_devices([0, 2], {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_tail_is_the_end_of_a_file(tmp_path):
    (tmp_path / "log").write_text("".join(f"line {i}\n" for i in range(50)))
    assert tail(tmp_path / "log", 2) == "line 48\nline 49"
    assert tail(tmp_path / "none") == "(empty)"


def test_requests_that_were_answered_do_not_push_the_cause_out_of_the_tail(tmp_path):
    answered = 'INFO:     127.0.0.1:50150 - "POST /generate HTTP/1.1" 200 OK\n'
    refused = 'INFO:     127.0.0.1:50150 - "POST /generate HTTP/1.1" 503 Service Unavailable'
    (tmp_path / "log").write_text(f"out of memory\n{answered * 30}{refused}\n{answered}")
    assert tail(tmp_path / "log", 2) == f"out of memory\n{refused}"
