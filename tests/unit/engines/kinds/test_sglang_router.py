"""What the router is told of servers that come and go."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from qwench.engines.kinds import sglang_router
from qwench.engines.kinds.sglang_router import SglangRouter, check_router_words
from qwench.errors import ConfigError, EngineError


class Process:
    """A router's process that another object plays."""

    label = "the router"

    def __init__(self, url: str) -> None:
        self.url, self.calls = url, list[str]()

    def start(self) -> str:
        self.calls.append("start")
        return self.url

    def stop(self) -> None:
        self.calls.append("stop")


class Routes:
    """`/workers` of a router that takes up and drops a server only after it was asked for its list `delay` times."""

    def __init__(self, *, delay: int) -> None:
        self.delay, self.asked = delay, list[str]()
        self.workers: dict[str, dict[str, Any]] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/workers", self.list)
        app.router.add_post("/workers", self.add)
        app.router.add_delete("/workers/{id}", self.remove)
        return app

    async def list(self, _: web.Request) -> web.Response:
        for worker in list(self.workers.values()):
            worker["left"] -= 1
            worker["is_healthy"] |= worker["left"] <= 0 and not worker["leaves"]
            if worker["leaves"] and worker["left"] <= 0:
                del self.workers[worker["id"]]
        return web.json_response({"workers": list(self.workers.values())})

    async def add(self, request: web.Request) -> web.Response:
        url = (await request.json())["url"]
        self.asked.append(f"add {url}")
        if not url.startswith("http"):
            return web.Response(status=400, text="no address")
        one = {"id": f"w{len(self.asked)}", "url": url, "is_healthy": False, "left": self.delay, "leaves": False}
        self.workers[one["id"]] = one
        return web.json_response({})

    async def remove(self, request: web.Request) -> web.Response:
        self.asked.append(f"remove {request.match_info['id']}")
        self.workers[request.match_info["id"]] |= {"leaves": True, "left": self.delay}
        return web.json_response({})


def with_router(scenario: Callable[[SglangRouter, Routes, Process], Awaitable[None]], *, delay: int = 2) -> None:
    async def run() -> None:
        routes = Routes(delay=delay)
        runner = web.AppRunner(routes.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        process = Process(f"http://127.0.0.1:{runner.addresses[0][1]}")
        router = SglangRouter(process, generate_timeout_s=1)  # type: ignore[arg-type]
        router.start()
        try:
            await scenario(router, routes, process)
        finally:
            await router.close()
            await runner.cleanup()

    asyncio.run(run())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_router, "POLL_S", 0.0)


def test_a_server_is_added_until_it_is_healthy_and_removed_until_it_is_gone():
    async def scenario(router: SglangRouter, routes: Routes, process: Process) -> None:
        await router.add("http://a:1")
        await router.add("http://b:1")
        assert [(one["url"], one["is_healthy"]) for one in routes.workers.values()] == [
            ("http://a:1", True),
            ("http://b:1", True),
        ]
        await router.remove("http://a:1")
        assert [one["url"] for one in routes.workers.values()] == ["http://b:1"]
        await router.remove("http://unknown:1")
        assert routes.asked == ["add http://a:1", "add http://b:1", "remove w1"]
        await router.check()
        await router.restart()
        assert process.calls == ["start", "stop", "start"]
        await router.check()

    with_router(scenario)


def test_what_the_router_refuses_or_never_does_is_an_error(monkeypatch):
    async def scenario(router: SglangRouter, routes: Routes, process: Process) -> None:
        url = re.escape(router.base_url)
        with pytest.raises(EngineError, match=r"^the router answered /workers with status 400: no address"):
            await router.add("a")
        monkeypatch.setattr(sglang_router, "CHANGE_TIMEOUT_S", 0.0)
        with pytest.raises(EngineError, match=rf"^the router at {url} did not take http://a:1 within 0 s; see its log"):
            await router.add("http://a:1")
        with pytest.raises(EngineError, match=rf"^the router at {url} did not drop http://a:1 within 0 s; see its log"):
            await router.remove("http://a:1")
        router.base_url = "http://127.0.0.1:1"
        with pytest.raises(EngineError, match=r"^the router at http://127\.0\.0\.1:1 did not answer /workers: "):
            await router.check()

    with_router(scenario, delay=10**9)


@pytest.mark.parametrize(("words", "got"), [(["--port"], "none"), (["--port", "x"], "x"), (["--port", "-1"], "-1")])
def test_a_port_is_a_number(words, got):
    with pytest.raises(ConfigError, match=f"^--router-port expects a number, got {got}$"):
        check_router_words(words)
