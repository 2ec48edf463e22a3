"""The paths of OpenAI's clients: /v1/models, /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.http.answers import FieldError, Json, json_answer
from qwench.engines.embedded.http.growing_answer import GrowingAnswer
from qwench.engines.embedded.http.open_requests import EventStream, OpenRequests
from qwench.engines.embedded.http.openai_answers import OpenAiAnswer
from qwench.engines.embedded.http.openai_requests import ChatBody, CompletionBody, SamplingFields


class OpenAiRoutes:
    """The handlers of one engine."""

    def __init__(self, engine: EmbeddedEngine, *, model: Callable[[], str]) -> None:
        """Serve `engine`; `model` returns the name of its weights now."""
        self._engine, self._model = engine, model
        self._created = int(time.time())

    def add_to(self, router: APIRouter) -> None:
        """Add the paths."""
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        router.add_api_route("/v1/completions", self.complete, methods=["POST"])
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])

    async def models(self) -> Response:
        """List the model and its adapters."""
        return json_answer({"object": "list", "data": self._cards()})

    async def model(self, name: str) -> Response:
        """Describe one of those that are listed."""
        for card in self._cards():
            if card["id"] == name:
                return json_answer(card)
        raise self._unknown(name)

    async def complete(self, body: CompletionBody, http: Request) -> Response:
        """Continue each prompt."""
        return await self._answer(body, http, prefix="cmpl")

    async def chat(self, body: ChatBody, http: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(body, http, prefix="chatcmpl")

    async def _answer(self, body: SamplingFields, http: Request, *, prefix: str) -> Response:
        body.check()
        adapter = body.lora_path or self._adapter_of(body.model)
        positions, tokenizer = self._engine.architecture.max_positions, self._engine.tokenizer
        # Rendering and tokenising take a while, in which the other requests go on.
        prompts = await asyncio.to_thread(body.prompts, tokenizer, max_tokens=positions)
        answer_id = body.rid or f"{prefix}-{uuid4().hex}"
        requests = body.requests(prompts, request_id=answer_id, adapter=adapter, positions=positions)
        asked = OpenRequests(self._engine, requests)
        choices = [GrowingAnswer(one, tokenizer, no_stop_trim=bool(body.no_stop_trim)) for one in asked.running]
        answer = OpenAiAnswer(body, choices, tokenizer, answer_id=answer_id)
        if body.streams:
            return EventStream(asked, answer.chunks)
        await asked.wait(http)
        return json_answer(answer.whole())

    def _adapter_of(self, model: str | None) -> str | None:
        """Return the adapter that the name of a model chooses, as NAME or SGLang's BASE:NAME; None: none.

        Without adapters every name means the one model, as in SGLang.

        Raises:
            FieldError: 404, there are adapters, and the name is neither one of them nor the model's.
        """
        adapters, served = self._engine.adapters.folders, self._model()
        if model is None or not adapters or model in (served, served.rstrip("/").rpartition("/")[2], "default"):
            return None
        for name in (model, model.partition(":")[2]):
            if name in adapters:
                return name
        raise self._unknown(model)

    def _unknown(self, name: str) -> FieldError:
        known = ", ".join(str(card["id"]) for card in self._cards())
        message = f"there is no model {name[:100]!r}; known: {known}."
        return FieldError("model", message, status_code=404, code="model_not_found")

    def _cards(self) -> list[Json]:
        base, positions = self._model(), self._engine.architecture.max_positions
        shared = {"object": "model", "created": self._created, "owned_by": "qwench", "max_model_len": positions}
        adapters = self._engine.adapters.folders.items()
        return [
            {"id": base, "root": base, "parent": None, **shared},
            *({"id": name, "root": folder, "parent": base, **shared} for name, folder in adapters),
        ]
