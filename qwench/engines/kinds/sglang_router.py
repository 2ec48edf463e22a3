"""The `sglang-router` process in front of engine servers: spreads `/generate` over them; everything else goes to each server.

Servers are added when they hold the current weights and removed when they are lost: stale ones generate nothing.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from qwench.engines.fleet.servers import ServerCommand, ServerProcess, check_port_is_free
from qwench.engines.kinds.sglang import check_words
from qwench.errors import ConfigError, EngineError
from qwench.wire.addresses import unused_port

ADDRESS = "127.0.0.1"
START_TIMEOUT_S = 60.0
CONTROL_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 60.0
"""The router adds and removes workers in the background."""
POLL_S = 0.1
DEFAULTS: Mapping[str, str] = {
    # The router's own default sees no text in our requests and would send everything to one server.
    "policy": "round_robin",
    "log-level": "warn",
    # SGLang generates a token to answer /health, which must not happen while its memory is released.
    "health-check-endpoint": "/model_info",
}

_PARSER_PROGRAM = """
from sglang_router.router_args import RouterArgs
RouterArgs.add_cli_args(parser, use_router_prefix=False)
"""


def router_command(
    words: Sequence[str], *, environ: Mapping[str, str], log_folder: Path, generate_timeout_s: float
) -> ServerCommand:
    """Return how to start the router with the user's --router-* flags (`words`, without that prefix).

    Args:
        generate_timeout_s: of a request; the router gives it twice as long, so that the client's deadline comes first.

    Raises:
        ConfigError: --router-port is not a port.
    """
    names = [word.removeprefix("--") for word in words if word.startswith("--")]
    rest, port = _take_port(words)
    defaults = {**DEFAULTS, "request-timeout-secs": str(math.ceil(2 * generate_timeout_s))}
    given = [word for name, value in defaults.items() if name not in names for word in (f"--{name}", value)]
    if "prometheus-port" not in names:
        given += ["--prometheus-port", str(unused_port(ADDRESS))]
    return ServerCommand(
        label="the router",
        argv=(sys.executable, "-P", "-m", "sglang_router.launch_router", *given, *rest),
        environ=environ,
        log_file=log_folder / "router.log",
        host=ADDRESS,
        port=port,
        start_timeout_s=START_TIMEOUT_S,
    )


def check_router_words(words: Sequence[str]) -> None:
    """Check the user's --router-* flags with the parser of the installed router.

    Raises:
        ConfigError: it is not installed or does not take them, or another process listens on --router-port.
    """
    _, port = _take_port(words)
    if port is not None:
        check_port_is_free("the router", ADDRESS, port, flag="--router-port")
    check_words(words, prefix="router", parser_program=_PARSER_PROGRAM, package="sglang-router")


class SglangRouter:
    """See `engines.fleet.members.Router`."""

    def __init__(self, server: ServerProcess, *, generate_timeout_s: float) -> None:
        self._server = server
        self.generate_timeout_s = generate_timeout_s
        """See `Router.generate_timeout_s`."""
        self._session: aiohttp.ClientSession | None = None
        self.base_url = ""
        """Where requests go; empty before `start`."""

    def start(self) -> None:
        """Start the process; blocks until it answers.

        Raises:
            EngineError: it died (a flag it does not know, a port that is taken) or did not answer in time.
        """
        self.base_url = self._server.start()

    @property
    def label(self) -> str:
        """See `Router.label`."""
        return self._server.label

    def is_running(self) -> bool:
        """See `Router.is_running`."""
        return self._server.is_running()

    def last_output(self) -> str:
        """See `Router.last_output`."""
        return self._server.last_output()

    async def check(self) -> None:
        """See `Router.check`."""
        await self._workers()

    async def restart(self) -> None:
        """See `Router.restart`."""
        await self.close()
        await asyncio.to_thread(self.start)

    async def add(self, url: str) -> None:
        """See `Router.add`."""
        await self._request("POST", "/workers", {"url": url})
        await self._wait(url, present=True)

    async def remove(self, url: str) -> None:
        """See `Router.remove`."""
        for worker in await self._workers():
            if worker["url"] == url:
                await self._request("DELETE", f"/workers/{worker['id']}", None)
        await self._wait(url, present=False)

    async def close(self) -> None:
        """See `Router.close`."""
        if self._session is not None:
            await self._session.close()
            self._session = None
        await asyncio.to_thread(self._server.stop)

    async def _wait(self, url: str, *, present: bool) -> None:
        deadline = time.monotonic() + CHANGE_TIMEOUT_S
        while True:
            known = [worker for worker in await self._workers() if worker["url"] == url]
            if any(worker["is_healthy"] for worker in known) if present else not known:
                return
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the router at {self.base_url} did not {'take' if present else 'drop'} {url} within "
                    f"{CHANGE_TIMEOUT_S:g} s; see its log."
                )
            await asyncio.sleep(POLL_S)

    async def _workers(self) -> list[dict[str, Any]]:  # the router's own records
        answer = await self._request("GET", "/workers", None)
        return list(answer["workers"])

    async def _request(self, method: str, path: str, body: Mapping[str, str] | None) -> Any:  # the router's JSON
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S))
        try:
            async with self._session.request(method, self.base_url + path, json=body) as response:
                if response.status >= 400:
                    text = (await response.text())[:300]
                    raise EngineError(f"the router answered {path} with status {response.status}: {text}")
                return await response.json()
        except (aiohttp.ClientError, TimeoutError) as cause:
            raise EngineError(f"the router at {self.base_url} did not answer {path}: {cause!r}.") from cause


def _take_port(words: Sequence[str]) -> tuple[list[str], int | None]:
    """Take `--port N` out of the words."""
    rest = list(words)
    if "--port" not in rest:
        return rest, None
    at = rest.index("--port")
    values = rest[at + 1 : at + 2]
    if not values or not values[0].isdecimal():
        raise ConfigError(f"--router-port expects a number, got {' '.join(values) or 'none'}")
    return rest[:at] + rest[at + 2 :], int(values[0])
