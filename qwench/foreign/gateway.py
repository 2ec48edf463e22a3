"""One address with SGLang's `/generate` in front of all engines of the run, also of the embedded one.

Requests of user code thus count as the run's own: they wait while weights are published, they carry weight versions, and they
end when the rollout ends. Code in this process that uses the stand-in `post` gets its answer without a connection.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from qwench.engines.embedded.http.api import GenerateBody, answer_text, no_stop_trims, to_response
from qwench.engines.embedded.http.border import foreign_caller
from qwench.errors import ConfigError, EngineError, cannot_listen
from qwench.rollout.agent_sessions import AgentSession, RequestRefusedError
from qwench.rollout.generate import Requests, TokenSource
from qwench.wire.addresses import http_url

LOOPBACK = "127.0.0.1"
_LOOPBACK_OF = {"0.0.0.0": LOOPBACK, "::": "::1"}
_MAX_BODY_BYTES = 2**24
Json = dict[str, Any]  # a JSON object has no closed type


@dataclass(kw_only=True, slots=True)
class Call:
    """One call of a user's generate function: whose requests it sends, and the weight versions that answered."""

    requests: Requests
    versions: list[int] = field(default_factory=list)


CURRENT_CALL: ContextVar[Call | None] = ContextVar("current_call", default=None)


class Gateway:
    """Lives on the engines' event loop."""

    def __init__(
        self,
        engines: TokenSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        agents_at: tuple[str, int] | None,
    ) -> None:
        """Listen nowhere yet.

        Args:
            max_tokens: the positions of the model.
            agents_at: host and port of the endpoints of agents. None: those of the gateway.
        """
        self._agents_at = agents_at
        self._sessions: dict[str, AgentSession] = {}
        self.requests = Requests(engines)
        """Of code that is not a generate function's own task."""
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Return the address."""
        return http_url(LOOPBACK, self.port)

    async def open(self) -> None:
        """Listen on a free port of this machine, and for agents where the flags say.

        Raises:
            ConfigError: another process listens there, or it is no address of this machine.
        """
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_of_this_machine])
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        for path in ("/workers", "/list_workers"):
            app.router.add_get(path, self._workers)
        for path in ("/health", "/health_generate"):
            app.router.add_get(path, self._health)
        for path in ("/chat/completions", "/v1/chat/completions"):
            app.router.add_post("/sessions/{name}" + path, self._complete)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, 0).start()
        self.port = self._runner.addresses[0][1]
        if self._agents_at is not None:
            host, port = self._agents_at
            try:
                await web.TCPSite(self._runner, host, port).start()
            except OSError as error:
                flag = "--session-server-ip and --session-server-port"
                raise ConfigError(cannot_listen("sessions of agents", host, port, error, flag=flag)) from error

    async def close(self) -> None:
        """End open requests and listen no more."""
        await self.requests.abort_in_flight()
        if self._runner is not None:
            await self._runner.cleanup()

    def open_session(self, name: str, session: AgentSession) -> str:
        """Serve a session, and return the address of its endpoint."""
        self._sessions[name] = session
        assert self._runner is not None, "open comes first"
        host, port = self._runner.addresses[-1][:2]
        return f"{http_url(_LOOPBACK_OF.get(host, host), port)}/sessions/{name}"

    def close_session(self, name: str) -> None:
        """Serve a session no more."""
        self._sessions.pop(name, None)

    async def _complete(self, http: web.Request) -> web.Response:
        session = self._sessions.get(http.match_info["name"])
        if session is None:
            return web.json_response({"error": {"message": "there is no such session"}}, status=404)
        try:
            return web.json_response(await session.answer(json.loads(await http.read())))
        except (RequestRefusedError, ConfigError, ValueError, RecursionError) as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)

    async def answer(self, payload: Json) -> Json:
        """Answer `/generate` as SGLang does.

        Raises:
            EngineError: the request is not one, or an engine failed.
        """
        try:
            body = GenerateBody.model_validate(payload)
        except ValidationError as error:
            raise EngineError(f"/generate: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
        if body.is_batch:
            raise EngineError("/generate: send one prompt in a request.")
        if body.stream:
            raise EngineError("/generate: stream is not supported here; send stream: false.")
        (request,) = body.to_requests(self._tokenizer, max_tokens=self._max_tokens)
        call = CURRENT_CALL.get()
        result = await (self.requests if call is None else call.requests).send(list(request.input_ids), request.sampling)
        if call is not None:
            call.versions += result.weight_versions[-1:]
        skip = request.sampling.skip_special_tokens
        if not result.text and result.output_ids:
            result = replace(result, text=str(self._tokenizer.decode(list(result.output_ids), skip_special_tokens=skip)))
        (keep,) = no_stop_trims(body, 1)
        text = answer_text(result, self._tokenizer, skip_special_tokens=skip, no_stop_trim=keep)
        return to_response(request, replace(result, text=text), body=body)

    async def _generate(self, http: web.Request) -> web.Response:
        try:
            return web.json_response(await self.answer(json.loads(await http.read())))
        except (EngineError, ValueError, RecursionError) as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)

    async def _abort(self, http: web.Request) -> web.Response:
        await self.requests.abort_in_flight()
        return web.json_response({"success": True})

    async def _workers(self, http: web.Request) -> web.Response:
        return web.json_response({"workers": [{"url": self.url}], "urls": [self.url]})

    async def _health(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


@web.middleware
async def _of_this_machine(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse pages of a browser, which reach loopback addresses too."""
    headers = {name.lower().encode("latin-1"): value.encode("latin-1", "replace") for name, value in request.headers.items()}
    # The names of sessions cannot be guessed, and agents may run on other machines.
    refused = None if request.path.startswith("/sessions/") else foreign_caller(headers, loopback_only=True)
    if refused is not None:
        return web.json_response({"error": {"message": refused}}, status=403)
    return await handler(request)
