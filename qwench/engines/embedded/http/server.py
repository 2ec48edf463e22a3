"""SGLang's HTTP API in front of the embedded engine.

Clients written for SGLang find the same paths, bodies and answers; `openai_routes` has those of OpenAI's clients. Paths that
change weights, memory or the requests of others need the run's bearer token, if there is one. `weight_routes` receives weights.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http import answers
from qwench.engines.embedded.http.adapter_routes import AdapterCheck, AdapterRoutes, any_base
from qwench.engines.embedded.http.answers import FieldError, Json, error_record, json_answer
from qwench.engines.embedded.http.api import GenerateBody, no_stop_trims, to_response
from qwench.engines.embedded.http.border import Border
from qwench.engines.embedded.http.growing_answer import GrowingAnswer
from qwench.engines.embedded.http.open_requests import EventStream, OpenRequests
from qwench.engines.embedded.http.openai_routes import OpenAiRoutes
from qwench.engines.embedded.http.weight_routes import WeightRoutes
from qwench.engines.protocol import EngineStats, GenerateRequest, MemoryTag, SamplingParams
from qwench.errors import EngineError, WeightSyncError
from qwench.wire.addresses import placement_of
from qwench.wire.portions import DEFAULT_BUCKET_BYTES

HEALTH_TIMEOUT_S = 20.0
MAX_PROMPTS = 64
"""How many prompts of the model's full length a body of `/generate` has room for."""
_PAUSE_MODES = ("abort", "in_place", "retract")
_BYTES_OF_A_TOKEN = 12
"""Of a token id and its comma in JSON, or of the text of a token."""
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class AbortBody(BaseModel):
    """Body of `/abort_request`."""

    rid: str | None = None
    abort_all: bool = False


class PauseBody(BaseModel):
    """Body of `/pause_generation`."""

    mode: str = "abort"


class MemoryBody(BaseModel):
    """Body of `/release_memory_occupation` and `/resume_memory_occupation`."""

    tags: list[str] | None = None


class EngineServer:
    """The handlers of one engine; `app` is what a web server runs."""

    def __init__(
        self,
        engine: EmbeddedEngine,
        *,
        model_path: str,
        token: str | None,
        adapters: Mapping[str, Path],
        check_base: AdapterCheck = any_base,
        loopback_only: bool = True,
    ) -> None:
        """Serve `engine`.

        Args:
            adapters: PEFT folders by the names that requests give.
            check_base: of adapters that clients load.
            token: that clients must show to change weights and memory. None or empty: every client may.
            loopback_only: the server listens for this machine alone.
        """
        self._engine = engine
        self._loopback_only = loopback_only
        self._model_path = model_path
        self._token = token or None
        self._num_health_checks = 0
        self._adapter_routes = AdapterRoutes(engine, adapters, check_base)
        self._openai_routes = OpenAiRoutes(engine, model=lambda: self._model_path)
        self._weight_routes = WeightRoutes(engine, device=engine.device, on_new_folder=self._note_folder)

    def app(self) -> FastAPI:
        """Build the application; its end closes the engine."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            await self._engine.close()

        app = FastAPI(title="Qwench embedded engine", lifespan=lifespan)
        app.add_exception_handler(RequestValidationError, answers.answer_invalid)
        app.add_exception_handler(HTTPException, answers.answer_status)
        app.add_exception_handler(FieldError, answers.answer_field_error)
        app.add_exception_handler(EngineError, self._answer_engine_error)
        app.add_exception_handler(WeightSyncError, answers.answer_weight_error)
        app.include_router(self._generation_routes())
        app.include_router(self._information_routes())
        app.include_router(self._guarded_routes())
        sizes = self._engine.architecture
        app.add_middleware(
            Border,
            body_limits={"/update_weights_from_tensor": _weight_body_bytes(sizes.vocab_size * sizes.hidden_size)},
            default_limit=max(2**20, MAX_PROMPTS * _BYTES_OF_A_TOKEN * sizes.max_positions),
            loopback_only=self._loopback_only,
        )
        return app

    def _generation_routes(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/generate", self.generate, methods=["POST", "PUT"])
        self._openai_routes.add_to(router)
        return router

    def _information_routes(self) -> APIRouter:
        router = APIRouter()
        routes: dict[str, Callable[[], Awaitable[Response]]] = {
            "/health": self.health,
            "/health_generate": self.health_generate,
            "/get_model_info": self.model_info,
            "/model_info": self.model_info,
            "/get_server_info": self.server_info,
            "/server_info": self.server_info,
            "/get_weight_version": self.get_weight_version,
            "/metrics": self.metrics,
        }
        for path, handler in routes.items():
            router.add_api_route(path, handler, methods=["GET"])
        return router

    def _guarded_routes(self) -> APIRouter:
        router = APIRouter(dependencies=[Depends(self._check_token)])
        self._weight_routes.add_to(router)
        self._adapter_routes.add_to(router)
        for path, handler in (
            ("/abort_request", self.abort_request),
            ("/pause_generation", self.pause_generation),
            ("/continue_generation", self.continue_generation),
        ):
            router.add_api_route(path, handler, methods=["POST"])
        router.add_api_route("/flush_cache", self.flush_cache, methods=["GET", "POST"])
        router.add_api_route("/release_memory_occupation", self.release_memory_occupation, methods=["GET", "POST"])
        router.add_api_route("/resume_memory_occupation", self.resume_memory_occupation, methods=["GET", "POST"])
        return router

    async def generate(self, body: GenerateBody, http: Request) -> Response:
        """Answer one prompt by an object, a list of prompts by a list."""
        tokenizer = self._engine.tokenizer
        # Tokenising a long text takes a while, in which the other requests go on.
        requests = await asyncio.to_thread(body.to_requests, tokenizer, max_tokens=self._engine.architecture.max_positions)
        asked, trims = OpenRequests(self._engine, requests), no_stop_trims(body, len(requests))
        grow = [
            GrowingAnswer(running, tokenizer, no_stop_trim=keep) for running, keep in zip(asked.running, trims, strict=True)
        ]
        if body.stream:
            return EventStream(asked, lambda: _news(grow, body))
        await asked.wait(http)
        responses = list(_news(grow, body))
        return json_answer(responses if body.is_batch else responses[0])

    async def abort_request(self, body: AbortBody) -> Response:
        """End all requests, or those whose id begins with `rid`, as in SGLang; an unknown id is no error."""
        if not body.rid and not body.abort_all:
            raise HTTPException(400, "send rid, or abort_all: true.")
        await self._engine.abort(None if body.abort_all else body.rid, begins=True)
        return Response()

    async def pause_generation(self, body: PauseBody) -> Response:
        """Hold generation: `abort` ends what runs, `in_place` keeps it where it is, `retract` computes its KV cache again."""
        if body.mode not in _PAUSE_MODES:
            raise HTTPException(400, f"mode {body.mode!r} is not supported; known: {', '.join(_PAUSE_MODES)}.")
        await self._engine.pause(retract=body.mode == "retract")
        if body.mode == "abort":
            await self._engine.abort()
        return json_answer({"status": "ok", "message": "generation is paused"})

    async def continue_generation(self) -> Response:
        """Go on after a pause."""
        await self._engine.resume()
        return json_answer({"status": "ok", "message": "generation goes on"})

    async def flush_cache(self) -> Response:
        """Forget cached prefixes."""
        await self._engine.flush_cache()
        return Response("Cache flushed.\n")

    async def health(self) -> Response:
        """Answer 200 when the engine can generate, else 503."""
        return Response(status_code=200 if await self._engine.health() else 503)

    async def health_generate(self) -> Response:
        """Generate one token; 503 when that fails or takes too long."""
        self._num_health_checks += 1
        probe = GenerateRequest(
            request_id=f"health-{self._num_health_checks}",
            input_ids=[0],
            sampling=SamplingParams(max_new_tokens=1, temperature=0.0),
        )
        try:
            await asyncio.wait_for(self._engine.generate(probe), HEALTH_TIMEOUT_S)
        except (EngineError, TimeoutError) as cause:
            return Response(str(cause), status_code=503)
        return Response()

    async def model_info(self) -> Response:
        """Say what is served; the sizes are our addition."""
        sizes = self._engine.architecture
        return json_answer(
            {
                "model_path": self._model_path,
                "is_generation": True,
                "weight_version": str(await self._engine.weight_version()),
                "vocab_size": sizes.vocab_size,
                "hidden_size": sizes.hidden_size,
                "num_hidden_layers": sizes.num_layers,
            }
        )

    async def server_info(self) -> Response:
        """Say where the engine is, how large and how busy."""
        return json_answer(
            {
                "model_path": self._model_path,
                "weight_version": str(await self._engine.weight_version()),
                "placement": placement_of(self._engine.device),
                "context_length": self._engine.architecture.max_positions,
                "stats": await self._engine.stats(),
            }
        )

    async def metrics(self) -> Response:
        """Say load and counters to Prometheus."""
        version = await self._engine.weight_version()
        text = metrics_text(await self._engine.stats(), weight_version=version, model=self._model_path)
        return Response(text, media_type=_METRICS_TYPE)

    async def get_weight_version(self) -> Response:
        """Say which weights are in use."""
        return json_answer({"weight_version": str(await self._engine.weight_version())})

    async def release_memory_occupation(self, body: MemoryBody | None = None) -> Response:
        """Give memory back, to the trainer's processes."""
        await self._engine.sleep(_tags(body))
        await self._engine.release_cache()
        return Response()

    async def resume_memory_occupation(self, body: MemoryBody | None = None) -> Response:
        """Take memory again."""
        await self._engine.wake(_tags(body))
        return Response()

    def _note_folder(self, folder: str) -> None:
        self._model_path = folder

    async def _check_token(self, http: Request) -> None:
        given = http.headers.get("authorization", "")
        # Starlette decodes header bytes as Latin-1; the token's own bytes are UTF-8.
        if self._token is not None and not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self._token}".encode()):
            raise HTTPException(401, "this endpoint needs the run's token: Authorization: Bearer ...")

    async def _answer_engine_error(self, _: Request, error: Exception) -> Response:
        # A healthy engine refused the request; an unhealthy one failed it.
        status_code = 400 if await self._engine.health() else 503
        return json_answer(error_record(status_code, str(error)), status_code)


def _news(answers: Sequence[GrowingAnswer], body: GenerateBody) -> Iterator[Json]:
    """Yield the responses that grew, each from its beginning; SGLang says the index of those of a list in streams."""
    for index, answer in enumerate(answers):
        result = answer.advance()
        if result is not None:
            place = {"index": index} if body.stream and body.is_batch else {}
            yield to_response(answer.request, result, body=body, ended=answer.ended) | place


def _weight_body_bytes(largest_tensor: int) -> int:
    """Return how large a bucket of safetensors may be: the largest tensor in float32, or what senders pack together."""
    return max(4 * largest_tensor, 2 * DEFAULT_BUCKET_BYTES) + 2**20


def _tags(body: MemoryBody | None) -> list[MemoryTag]:
    known = {tag.value for tag in MemoryTag}
    if body is None or body.tags is None:
        return list(MemoryTag)
    unknown = sorted(set(body.tags) - known)
    if unknown:
        raise HTTPException(400, f"unknown tags {unknown}; known: {', '.join(sorted(known))}.")
    return [MemoryTag(tag) for tag in body.tags]


def metrics_text(stats: EngineStats, *, weight_version: int, model: str) -> str:
    """Return one sample of each metric, labelled with the model's name."""
    used = stats.num_pages - stats.num_free_pages
    metrics = (
        ("sglang:num_running_reqs", "gauge", "Requests that are computed now.", stats.num_running),
        ("sglang:num_queue_reqs", "gauge", "Requests that wait for room.", stats.num_waiting),
        ("sglang:token_usage", "gauge", "Share of the KV cache's pages in use.", used / max(stats.num_pages, 1)),
        ("sglang:cache_hit_rate", "gauge", "Share of all prompt tokens that were cached.",
         stats.cached_prompt_tokens / max(stats.prompt_tokens, 1)),
        ("sglang:prompt_tokens_total", "counter", "Prompt tokens, cached ones included.", stats.prompt_tokens),
        ("sglang:cached_tokens_total", "counter", "Prompt tokens that were cached.", stats.cached_prompt_tokens),
        ("sglang:generation_tokens_total", "counter", "Tokens that were sampled.", stats.generated_tokens),
        ("qwench:preempted_requests_total", "counter", "Preemptions of requests for want of pages.", stats.num_preempted),
        ("qwench:decode_steps_total", "counter", "Forward passes with decoding requests.", stats.decode_steps),
        ("qwench:weight_version", "gauge", "Version of the weights in use.", weight_version),
    )  # fmt: skip
    label = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return "".join(
        f'# HELP {name} {meaning}\n# TYPE {name} {kind}\n{name}{{model_name="{label}"}} {value}\n'
        for name, kind, meaning, value in metrics
    )
