"""What `qwench serve` starts, in which order, and what it says of it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwench.engines.embedded.http import serving
from qwench.engines.embedded.http.adapter_routes import any_base
from qwench.engines.embedded.http.border import HeaderDeadline
from qwench.errors import EngineError


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Return what is checked, loaded and run."""
    calls: list[tuple[object, ...]] = []

    def note(name: str, result: object) -> object:
        return lambda *given, **options: calls.append((name, *given, options)) or result

    monkeypatch.setattr(serving, "check_port_is_free", note("port", None))
    monkeypatch.setattr(serving.EmbeddedEngine, "from_checkpoint", note("load", "engine"))
    monkeypatch.setattr(serving, "EngineServer", note("server", SimpleNamespace(app=lambda: "app")))
    monkeypatch.setattr(serving.uvicorn, "run", note("run", None))
    return calls


@pytest.mark.parametrize(
    ("host", "token", "is_local"),
    [*((host, "", True) for host in ("127.0.0.1", "localhost", "::1")), ("0.0.0.0", "t", False)],
)
def test_a_checkpoint_is_loaded_when_its_port_is_free_and_served(host, token, is_local, done, caplog):
    adapters, options = {"a": Path("/a")}, {"waits_for_weights": True}
    with caplog.at_level(logging.INFO, logger="qwench"):
        serving.serve("m", "settings", host=host, port=7, token=token, adapters=adapters, check_base=print, **options)
    server = {"model_path": "m", "token": token or None, "adapters": adapters, "check_base": print, "loopback_only": is_local}
    run = {"host": host, "port": 7, "log_level": "info", "http": HeaderDeadline, "timeout_keep_alive": 75}
    assert done == [
        ("port", "the server", host, 7, {"flag": "--port"}),
        ("load", "m", "settings", options),
        ("server", "engine", server),
        ("run", "app", run),
    ]
    open_to_all = "no token is set: every program of this machine may change weights and memory"
    assert caplog.messages == [serving.greeting("m", adapters, host=host, port=7), *([open_to_all] if not token else [])]


def test_this_machine_alone_is_served_without_a_token(done):
    serving.serve("m", "settings")
    (_, _, host, port, _), (*_, load), (*_, server), _ = done
    assert (host, port, load["waits_for_weights"]) == ("127.0.0.1", 30_000, False)
    assert (server["token"], dict(server["adapters"]), server["check_base"]) == (None, {}, any_base)
    for token in (None, ""):
        with pytest.raises(EngineError, match=r"^--host 0\.0\.0\.0 lets other machines change this engine's weights; set a"):
            serving.serve("m", "settings", host="0.0.0.0", token=token)
    assert len(done) == 4


def test_the_greeting_is_a_request_that_names_the_first_adapter():
    said = serving.greeting("m", {}, host="h", port=1)
    sampling = '"sampling_params": {"max_new_tokens": 32}}'
    ask = 'curl -s http://h:1/generate -H \'Content-Type: application/json\' -d \'{"text": "1 + 2 =", '
    assert said == f"serving m; OpenAI's clients: http://h:1/v1; ask: {ask}{sampling}'"
    named = serving.greeting("m", {"a": Path("/a"), "b": Path("/b")}, host="h", port=1)
    assert named == f'serving m with adapters a, b; OpenAI\'s clients: http://h:1/v1; ask: {ask}"lora_path": "a", {sampling}\''
