"""Runs the embedded engine's HTTP server: in the foreground for `qwench serve`, or in a thread beside other work."""

from __future__ import annotations

import json
import logging
import shlex
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import uvicorn

from qwench.engines.client import SERVER_IDLE_TIMEOUT_S
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http.adapter_routes import AdapterCheck, any_base
from qwench.engines.embedded.http.border import HeaderDeadline
from qwench.engines.embedded.http.server import EngineServer
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.fleet.servers import check_port_is_free
from qwench.errors import EngineError
from qwench.threads import daemon
from qwench.wire.addresses import http_url

_logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_LOOPBACK_HOSTS = (LOOPBACK, "localhost", "::1")
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
_ANSWERS_TIMEOUT_S = 1
"""Whole seconds for answers under way when the server stops."""
_START_POLL_S = 0.01
_CONNECTIONS: dict[str, Any] = {"http": HeaderDeadline, "timeout_keep_alive": SERVER_IDLE_TIMEOUT_S}  # Any: uvicorn's options


def serve(
    checkpoint: str | Path,
    settings: EmbeddedSettings,
    *,
    host: str = LOOPBACK,
    port: int = 30_000,
    token: str | None = None,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    check_base: AdapterCheck = any_base,
    waits_for_weights: bool = False,
) -> None:
    """Load a checkpoint and serve it until interrupted.

    Args:
        checkpoint: Hugging Face folder with tokenizer.
        settings: of the engine.
        host: address to listen on; only this machine reaches the default.
        port: to listen on.
        token: what clients must show to change weights or memory. None or empty: every client may.
        adapters: PEFT folders by the names that requests give.
        check_base: of adapters that clients load.
        waits_for_weights: load none; see `EmbeddedEngine.from_checkpoint`.

    Raises:
        ConfigError: a model this engine cannot run, an adapter of another model, or a port that is taken.
        EngineError: an open port without a token.
    """
    token = token or None  # an empty one would be no secret
    if host not in _LOOPBACK_HOSTS and token is None:
        raise EngineError(f"--host {host} lets other machines change this engine's weights; set a token too.")
    check_port_is_free("the server", host, port, flag="--port")
    engine = EmbeddedEngine.from_checkpoint(checkpoint, settings, waits_for_weights=waits_for_weights)
    loopback_only = host in _LOOPBACK_HOSTS
    server = EngineServer(
        engine,
        model_path=str(checkpoint),
        token=token,
        adapters=adapters,
        check_base=check_base,
        loopback_only=loopback_only,
    )
    _logger.info(greeting(checkpoint, adapters, host=host, port=port))
    if token is None:
        _logger.info("no token is set: every program of this machine may change weights and memory")
    uvicorn.run(
        server.app(), host=host, port=port, log_level="info", http=HeaderDeadline, timeout_keep_alive=SERVER_IDLE_TIMEOUT_S
    )


def greeting(checkpoint: str | Path, adapters: Mapping[str, Path], *, host: str, port: int) -> str:
    """Return what is served, where, and a request that can be pasted into a shell."""
    named = {"lora_path": next(iter(adapters))} if adapters else {}
    body = json.dumps({"text": "1 + 2 =", **named, "sampling_params": {"max_new_tokens": 32}})
    url = http_url(host, port)
    request = ["curl", "-s", f"{url}/generate", "-H", "Content-Type: application/json", "-d", body]
    beside = f" with adapters {', '.join(adapters)}" if adapters else ""
    return f"serving {checkpoint}{beside}; OpenAI's clients: {url}/v1; ask: {shlex.join(request)}"


class ServerThread:
    """A server on a free port of this machine, in a thread of this process; a context manager.

    The engine belongs to the thread's event loop: inside the context, use it only through HTTP.
    """

    def __init__(
        self,
        engine: EmbeddedEngine,
        *,
        model_path: str = "",
        token: str | None = None,
        adapters: Mapping[str, Path] = MappingProxyType({}),
        check_base: AdapterCheck = any_base,
    ) -> None:
        self._socket = socket.create_server((LOOPBACK, 0))
        app = EngineServer(engine, model_path=model_path, token=token, adapters=adapters, check_base=check_base).app()
        options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_ANSWERS_TIMEOUT_S, **_CONNECTIONS)
        self._server = uvicorn.Server(options)
        self._thread = daemon("qwench-engine-server", self._server.run, [self._socket])

    @property
    def base_url(self) -> str:
        """Return where it listens."""
        return http_url(LOOPBACK, self._socket.getsockname()[1])

    def __enter__(self) -> ServerThread:
        """Start, and return when requests are answered."""
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise EngineError(f"the engine's server did not start within {START_TIMEOUT_S:g} s; see its log.")
            time.sleep(_START_POLL_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the server and its engine."""
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        self._socket.close()
