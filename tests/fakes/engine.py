"""An engine without a model: it writes what a function says, one character a tick, and records what happened.

A tick is one turn of the event loop, so that tests decide by counting, not by waiting, which response ends first.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from qwench.engines.protocol import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    MemoryTag,
    WeightBucket,
    WeightReceipt,
)


class CharTokenizer:
    """One token for each character: its code point. NUL is the only special token."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(token_id) for token_id in token_ids if token_id or not skip_special_tokens)


def log_prob_of(token_id: int) -> float:
    """Return what the fake engine reports for a token: an exact float32."""
    return -token_id / 1024


class FakeEngine:
    """Writes `reply(context, request)`; stop words and length limits cut it as they would a model's response.

    Args:
        reply: (prompt text as of this request, request) -> everything the model would write.
        ticks: (prompt text, request) -> event-loop turns before the first token; None: until aborted.
    """

    def __init__(
        self,
        reply: Callable[[str, GenerateRequest], str],
        *,
        ticks: Callable[[str, GenerateRequest], int | None] = lambda context, request: 0,
    ) -> None:
        self.events: list[tuple[str, str]] = []
        """("start" | "stop" | "length" | "abort", prompt text of the request), in order."""
        self.requests: list[GenerateRequest] = []
        self.num_running = 0
        self.max_running = 0
        self.version = 0
        self.closed = self.paused = False
        self._reply, self._ticks = reply, ticks
        self._aborted: dict[str, asyncio.Event] = {}

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        context = CharTokenizer().decode(request.input_ids)
        self.requests.append(request)
        self.events.append(("start", context))
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        self._aborted[request.request_id] = asyncio.Event()
        versions: list[int] = []
        try:
            text, reason = await self._write(context, request, versions)
        finally:
            self.num_running -= 1
            del self._aborted[request.request_id]
        self.events.append((reason.value, context))
        token_ids = [ord(character) for character in text]
        return GenerateResult(
            request_id=request.request_id,
            output_ids=token_ids,
            log_probs=[log_prob_of(token_id) for token_id in token_ids],
            finish_reason=reason,
            weight_versions=versions[: len(token_ids)] + [self.version] * (len(token_ids) - len(versions)),
            text=text,
            cached_tokens=len(request.input_ids) // 2,
        )

    def holds(self, context: str, written: int) -> bool:
        """Tell whether a response waits before its next character; for engines of tests to override."""
        return False

    async def abort(self, request_id: str | None = None) -> None:
        for running, aborted in self._aborted.items():
            if request_id in (None, running):
                aborted.set()

    async def pause(self, *, retract: bool = False) -> None:
        self.events.append(("retract" if retract else "pause", ""))
        self.paused = True

    async def resume(self) -> None:
        self.events.append(("resume", ""))
        self.paused = False

    async def update_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> WeightReceipt:
        self.version = version
        return WeightReceipt(version=version)

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        assert not self.num_running, "asleep with requests running"

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        pass

    async def flush_cache(self) -> None:
        pass

    async def health(self) -> bool:
        return not self.closed

    async def stats(self) -> EngineStats:
        return EngineStats(num_running=self.num_running)

    async def weight_version(self) -> int:
        return self.version

    async def close(self) -> None:
        self.closed = True

    async def _write(self, context: str, request: GenerateRequest, versions: list[int]) -> tuple[str, FinishReason]:
        """Wait the ticks, write one character a tick and note its version, and look for an abort at each of them."""
        aborted = self._aborted[request.request_id]
        ticks = self._ticks(context, request)
        full, reason = _cut(self._reply(context, request), request)
        if ticks is None:
            await aborted.wait()
        for _ in range(ticks or 0):
            if aborted.is_set():
                break
            await asyncio.sleep(0)
        for written in range(len(full)):
            while (self.paused or self.holds(context, written)) and not aborted.is_set():
                await asyncio.sleep(0)
            if aborted.is_set():
                return full[:written], FinishReason.ABORT
            versions.append(self.version)
            await asyncio.sleep(0)
        return (full, FinishReason.ABORT) if aborted.is_set() and not full else (full, reason)


def _cut(text: str, request: GenerateRequest) -> tuple[str, FinishReason]:
    """End the text behind its first stop word, or at the length limit."""
    ends = [text.index(stop) + len(stop) for stop in request.sampling.stop if stop in text]
    text = text[: min(ends)] if ends else text
    limit = request.sampling.max_new_tokens
    return (text, FinishReason.STOP) if len(text) <= limit else (text[:limit], FinishReason.LENGTH)
