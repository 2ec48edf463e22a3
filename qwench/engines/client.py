"""An engine behind SGLang's HTTP API: the embedded one's server, or SGLang itself.

Only a request that never reached the server is sent again. A server that is gone, silent or not ready raises EngineLostError:
the caller may ask another engine. Other failures raise EngineError. Both name the address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import aiohttp
import orjson
from safetensors.torch import save as save_safetensors

from qwench.config.sections.timeouts import TimeoutConfig
from qwench.engines.protocol import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    MemoryTag,
    SamplingParams,
    Scores,
    Scoring,
    WeightReceipt,
)
from qwench.errors import EngineError, EngineLostError, WeightSyncError
from qwench.wire.addresses import EngineAddress, Placement
from qwench.wire.portions import WeightBucket

Json = Any  # what a server answers has no closed type
_DEFAULTS = TimeoutConfig()
CONNECT_ATTEMPTS = 4
CONNECT_BACKOFF_S = 0.25
CONTROL_TIMEOUT_S = 60.0
HEALTH_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 30.0
"""How long a server may take to notice that its last request has ended."""
NOT_READY = (502, 503, 504)
"""Status of a router without servers, and of a server that has lost its weights or stops."""
OF_A_ROUTER = (500, *NOT_READY)
"""A router also answers 500 for a while after one of its servers has died."""
IDLE_TIMEOUT_S = 2.0
"""How long a client keeps an idle connection: less than any server does (5 s), which may close it under the next request."""
SERVER_IDLE_TIMEOUT_S = 75
"""How long servers that we start keep one: a busy client notices seconds late that an answer has come, and idleness begins."""


class HttpEngine:
    """See `engines.protocol.Engine`. Opens its connections on first use, in the loop that uses it."""

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        kind: str = "",
        label: str = "",
        placement: Placement | None = None,
        generate_timeout_s: float = _DEFAULTS.generate_timeout,
        health_timeout_s: float = HEALTH_TIMEOUT_S,
        lost_statuses: Sequence[int] = NOT_READY,
    ) -> None:
        """Take an address.

        Args:
            kind: `EngineKind.name`, for the publisher; this client treats all kinds alike.
            label: name in messages, before the address.
            lost_statuses: the HTTP statuses that mean that the server is gone or not ready.
        """
        self._lost_statuses = lost_statuses
        self._base_url = base_url.rstrip("/")
        self.address = EngineAddress(base_url=self._base_url, token=token, kind=kind, placement=placement, label=label)
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._generate_timeout_s = generate_timeout_s
        self._health_timeout_s = health_timeout_s
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"{self.address.label} ({self._base_url})" if self.address.label else f"HttpEngine({self._base_url})"

    def note_restart(self) -> None:
        """Count a restart of the server in the address."""
        self.address = replace(self.address, start=self.address.start + 1)

    @property
    def base_url(self) -> str:
        """Return where the server listens."""
        return self._base_url

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """See `Engine.generate`; a cancelled caller's request is aborted on the server."""
        body = {
            "rid": _wire_id(request.request_id),
            "input_ids": list(request.input_ids),
            "sampling_params": _sampling_body(request.sampling),
            "return_logprob": True,
            **_scoring_body(request.scoring),
            **({} if request.adapter is None else {"lora_path": request.adapter}),
            **({} if request.priority == 0 else {"priority": request.priority}),
        }
        try:
            answer = await self.post("/generate", body, timeout_s=self._generate_timeout_s)
        except asyncio.CancelledError:
            await asyncio.shield(self._abort_abandoned(request.request_id))
            raise
        return self._read_result(request, answer)

    async def abort(self, request_id: str | None = None) -> None:
        """See `Engine.abort`."""
        await self.post("/abort_request", {"rid": _wire_id(request_id or ""), "abort_all": request_id is None})

    async def _abort_abandoned(self, request_id: str) -> None:
        """Abort a request whose caller has gone, and may go again before the server answers."""
        with suppress(EngineError):  # a router has no such path, and a server that was lost needs no abort
            await self.abort(request_id)

    async def pause(self, *, retract: bool = False) -> None:
        """See `Engine.pause`."""
        await self.post("/pause_generation", {"mode": "retract" if retract else "in_place"})

    async def resume(self) -> None:
        """See `Engine.resume`."""
        await self.post("/continue_generation", {})

    async def update_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> WeightReceipt:
        """See `Engine.update_weights`; sends safetensors, which the embedded engine's server takes."""
        answer: Json = None
        index = 0
        iterator = iter(buckets)
        bucket = await asyncio.to_thread(next, iterator, None)
        while bucket is not None:
            body = await asyncio.to_thread(_serialise, bucket)
            bucket = await asyncio.to_thread(next, iterator, None)
            query = f"weight_version={version}&index={index}&final={'true' if bucket is None else 'false'}"
            index += 1
            path, timeout_s = f"/update_weights_from_tensor?{query}", _DEFAULTS.update_weights_timeout
            answer = await self._request("POST", path, body, "application/octet-stream", timeout_s)
        if answer is None:
            raise WeightSyncError(f"weight version {version} for {self!r} has no buckets at all.")
        return WeightReceipt(version=int(answer["weight_version"]), checksums=answer["checksums"])

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        """See `Engine.sleep`."""
        # SGLang's scheduler dies of a release while it holds a request; it counts one as held a little after answering it.
        await self.post(f"/flush_cache?timeout={DRAIN_TIMEOUT_S:g}", {}, timeout_s=2 * DRAIN_TIMEOUT_S)
        await self.post("/release_memory_occupation", {"tags": [tag.value for tag in tags]})

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        """See `Engine.wake`."""
        await self.post("/resume_memory_occupation", {"tags": [tag.value for tag in tags]})

    async def flush_cache(self) -> None:
        """See `Engine.flush_cache`."""
        await self.post("/flush_cache", {})

    async def health(self) -> bool:
        """See `Engine.health`; a server that cannot be reached is not healthy."""
        try:
            await self._request("GET", "/health", None, None, self._health_timeout_s, attempts=1)
        except EngineError:
            return False
        return True

    async def stats(self) -> EngineStats:
        """See `Engine.stats`; a server that does not count what we do reports zeros."""
        counted = (await self._get("/server_info")).get("stats", {})
        return EngineStats(**{field.name: counted[field.name] for field in fields(EngineStats) if field.name in counted})

    async def weight_version(self) -> int:
        """See `Engine.weight_version`.

        Raises:
            EngineError: the server's version is not one of ours.
        """
        return self._read_version((await self.model_info())["weight_version"])

    async def model_info(self) -> dict[str, Json]:
        """Return what the server says of the model it serves.

        Raises:
            EngineError: it does not speak SGLang's API.
        """
        answer = await self._get("/model_info")
        if not isinstance(answer, dict) or "model_path" not in answer or "weight_version" not in answer:
            raise EngineError(f"{self!r} answered /model_info with something else than SGLang does: {str(answer)[:200]!r}.")
        return answer

    async def server_info(self) -> dict[str, Json]:
        """Return what the server says of itself: its arguments, sizes and load."""
        answer = await self._get("/server_info")
        return answer if isinstance(answer, dict) else {}

    async def tokenize(self, text: str) -> list[int]:
        """Return the ids that the server's own tokenizer gives to a text, without special tokens.

        Raises:
            EngineError: the server has no such endpoint.
        """
        answer = await self.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        return [int(token) for token in answer["tokens"]]

    async def close(self) -> None:
        """Close the connections; the server keeps running."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _read_result(self, request: GenerateRequest, answer: Json) -> GenerateResult:
        try:
            meta = answer["meta_info"]
            sampled = meta.get("output_token_logprobs") or []
            finish = meta["finish_reason"]
            finish_reason = FinishReason(finish["type"])
            output_ids = [int(token) for _, token, *_ in sampled]
            versions = meta.get("weight_versions")
            if versions is None and not output_ids:
                versions = []
            elif versions is None:
                versions = [self._read_version(meta["weight_version"])] * len(output_ids)
            return GenerateResult(
                request_id=request.request_id,
                output_ids=output_ids,
                log_probs=[float(log_prob) for log_prob, *_ in sampled],
                finish_reason=finish_reason,
                matched=finish.get("matched"),
                weight_versions=versions,
                support=meta.get("output_support") or (),
                text=answer.get("text") or "",
                cached_tokens=meta.get("cached_tokens", 0),
                scores=(
                    _read_scores(request.input_ids, request.scoring, meta)
                    if request.scoring is not None and finish_reason is not FinishReason.ABORT
                    else None
                ),
            )
        except (KeyError, TypeError, ValueError) as cause:
            raise EngineError(f"{self!r} answered /generate with something else than SGLang does: {cause!r}.") from cause

    def _read_version(self, text: str | int) -> int:
        try:
            return int(text)
        except (TypeError, ValueError) as cause:
            raise EngineError(f"{self!r} has weight version {text!r}, not a number; publish weights to it first.") from cause

    async def _get(self, path: str) -> Json:
        return await self._request("GET", path, None, None, CONTROL_TIMEOUT_S)

    async def post(self, path: str, body: Mapping[str, Json], *, timeout_s: float = CONTROL_TIMEOUT_S) -> Json:
        """Send an object to one of the server's endpoints and return the decoded answer.

        Raises:
            EngineError: it did not answer in time, or refused.
        """
        return await self._request("POST", path, orjson.dumps(body), "application/json", timeout_s)

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        content_type: str | None,
        timeout_s: float,
        *,
        attempts: int = CONNECT_ATTEMPTS,
    ) -> Json:
        """Send a request and return the decoded answer; connect again a few times if no server listens yet."""
        headers = self._headers | ({"Content-Type": content_type} if content_type is not None else {})
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        for attempt in range(attempts):
            try:
                async with self._open_session().request(
                    method, self._base_url + path, data=body, headers=headers, timeout=timeout
                ) as response:
                    return self._read_answer(path, response.status, await response.read())
            except aiohttp.ClientConnectorError as cause:
                # Nothing was sent: after this failure alone, sending again cannot repeat an action.
                if attempt == attempts - 1:
                    raise EngineLostError(f"{self!r} cannot be reached for {path} ({attempts} attempts): {cause}") from cause
                await asyncio.sleep(CONNECT_BACKOFF_S * 2**attempt)
            except TimeoutError as cause:
                raise EngineLostError(f"{self!r} did not answer {path} within {timeout_s:g} s.") from cause
            except aiohttp.ClientError as cause:
                raise EngineLostError(f"{self!r} broke off during {path}: {cause!r}; the server may have ended.") from cause
        raise AssertionError("the last attempt returns or raises")

    def _read_answer(self, path: str, status: int, content: bytes) -> Json:
        try:
            answer = orjson.loads(content) if content[:1] in (b"{", b"[") else content.decode(errors="replace")
        except orjson.JSONDecodeError as cause:
            raise EngineError(f"{self!r} answered {path} with broken JSON.") from cause
        if status < 400:
            return answer
        if path.startswith("/update_weights") and isinstance(answer, dict) and answer.get("success") is False:
            raise WeightSyncError(f"{self!r} refused the weights: {answer['message']}")
        failure = EngineLostError if status in self._lost_statuses else EngineError
        raise failure(f"{self!r} answered {path} with status {status}: {_message(answer)}")

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit: concurrency is bounded where requests are made.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_TIMEOUT_S))
        return self._session


def _wire_id(request_id: str) -> str:
    """Return a request's id as servers know it: SGLang aborts every request whose id begins with the one it is told."""
    return request_id + "$"


def _sampling_body(sampling: SamplingParams) -> dict[str, Json]:
    body: dict[str, Json] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "min_new_tokens": sampling.min_new_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "skip_special_tokens": sampling.skip_special_tokens,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    if sampling.seed is not None:
        body["sampling_seed"] = sampling.seed
    if sampling.keeps_support:
        body["keeps_support"] = True
    return body


def _scoring_body(scoring: Scoring | None) -> dict[str, Json]:
    if scoring is None:
        return {}
    body: dict[str, Json] = {"logprob_start_len": scoring.start - 1}
    if scoring.top_k:
        body["top_logprobs_num"] = scoring.top_k
    if scoring.token_ids:
        body["token_ids_logprob"] = list(scoring.token_ids)
    return body


def _read_scores(input_ids: Sequence[int], scoring: Scoring, meta: Json) -> Scores:
    """Read SGLang's lists, in which an entry without a log-prob comes before the scored tokens.

    Raises:
        ValueError: they are not the tokens that were sent.
    """
    wanted = list(input_ids[scoring.start :])
    _, *entries = meta["input_token_logprobs"]
    named_tokens = [int(token) for _, token, *_ in entries]
    # SGLang names token 0 in place of the last one of the vocabulary.
    if len(named_tokens) != len(wanted) or any(one not in (token, 0) for one, token in zip(named_tokens, wanted, strict=True)):
        raise ValueError(f"input_token_logprobs has {len(entries)} tokens, which are not the {len(wanted)} sent")
    top = meta["input_top_logprobs"][1:] if scoring.top_k else []
    named = meta["input_token_ids_logprobs"][1:] if scoring.token_ids else []
    if len(top) not in (0, len(wanted)) or len(named) not in (0, len(wanted)):
        raise ValueError(f"{len(wanted)} tokens have {len(top)} input_top_logprobs, {len(named)} input_token_ids_logprobs")
    by_token = [{int(token): float(one) for one, token, *_ in row} for row in named]
    return Scores(
        log_probs=[float(one) for one, *_ in entries],
        top=[[(float(one), int(token)) for one, token, *_ in row] for row in top],
        of_token_ids=[[row[token] for token in scoring.token_ids] for row in by_token],
    )


def _serialise(bucket: WeightBucket) -> bytes:
    # Copies: safetensors refuses tensors that share memory, as slices of one parameter do.
    return save_safetensors({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in bucket})


def _message(answer: Json) -> str:
    if isinstance(answer, dict):
        error = answer.get("error", answer.get("error_message") or answer)
        return str(error.get("message", error.get("detail", error)) if isinstance(error, dict) else error)
    return str(answer)
