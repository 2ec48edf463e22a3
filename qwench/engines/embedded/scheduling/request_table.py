"""The unfinished requests of an engine, by id.

check_new -> add -> [abort] -> answer        every request leaves with a result or an error of its own
                    fail                     all leave with one error, and later ones are refused with it
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.protocol import FinishReason
from qwench.errors import EngineError


class RequestTable:
    """See the module docstring."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """`tokenizer` writes the text of results; None: they have none."""
        self._tokenizer = tokenizer
        self._requests: dict[str, RunningRequest] = {}
        self.failure: EngineError | None = None
        """The first error of all requests."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[RunningRequest]:
        return iter(self._requests.values())

    def check_new(self, request_id: str) -> None:
        """Raise EngineError if the engine failed, or an unfinished request has this id."""
        if self.failure is not None:
            raise EngineError(f"request {request_id!r} refused: {self.failure}") from self.failure
        if request_id in self._requests:
            raise EngineError(f"request id {request_id!r} is in use; ids of unfinished requests must differ.")

    def add(self, running: RunningRequest) -> None:
        """Take a new request."""
        self._requests[running.request.request_id] = running

    def drop(self, running: RunningRequest) -> None:
        """Abort a request unless it has left."""
        if self._requests.get(running.request.request_id) is running:
            running.finish_reason = FinishReason.ABORT

    def abort(self, request_id: str | None, *, begins: bool) -> None:
        """Abort the request of this id, or with `begins` those whose ids begin with it. None: all."""
        for name, running in self._requests.items():
            if request_id is None or name == request_id or (begins and name.startswith(request_id)):
                running.finish_reason = FinishReason.ABORT

    def aborted(self) -> list[RunningRequest]:
        """Return the aborted requests, which wait for their answers."""
        return [running for running in self if running.finish_reason is FinishReason.ABORT]

    def answer(self, running: RunningRequest) -> None:
        """Give the caller of an ended request its result, and forget it."""
        del self._requests[running.request.request_id]
        running.answer(self._tokenizer)

    def fail(self, failure: EngineError) -> None:
        """End all requests, now and later, with an error."""
        self.failure = self.failure or failure
        for running in self:
            if not running.future.done():
                running.fail(failure)
        self._requests.clear()
