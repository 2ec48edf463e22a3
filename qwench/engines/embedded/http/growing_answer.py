"""A response of a stream, whose tokens arrive one after the other.

Text is certain when no later token can change it: no half of a character, and nothing that may turn out to be the beginning of
a stop string, which is no part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from qwench.engines.embedded.http.api import answer_text
from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.protocol import GenerateResult

_INCOMPLETE = "\ufffd"


class GrowingAnswer:
    """Tells what is new of one response."""

    def __init__(self, running: RunningRequest, tokenizer: PreTrainedTokenizerBase | None, *, no_stop_trim: bool) -> None:
        sampling = running.request.sampling
        self.request = running.request
        self.ended = False
        self._running, self._tokenizer, self._no_stop_trim = running, tokenizer, no_stop_trim
        self._skip = sampling.skip_special_tokens
        self._text = GrowingText(tokenizer, skip_special_tokens=self._skip, stop=() if no_stop_trim else sampling.stop)
        self._num_told = 0

    def advance(self) -> GenerateResult | None:
        """Return the response so far, with its certain text. None: nothing is new since the last call.

        Raises:
            EngineError: the request failed.
        """
        if self.ended:
            return None
        if self._running.future.done():
            self.ended = True
            result = self._running.future.result()
            keep = self._no_stop_trim
            text = answer_text(result, self._tokenizer, skip_special_tokens=self._skip, no_stop_trim=keep)
            return replace(result, text=text)
        if self._running.num_output == self._num_told:
            return None
        self._num_told = self._running.num_output
        result = self._running.so_far()
        return replace(result, text=self._text.certain(result.output_ids))


class GrowingText:
    """Decodes each token about twice, however long the response is."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, *, skip_special_tokens: bool, stop: Sequence[str] = ()
    ) -> None:
        """Begin with no text.

        Args:
            stop: strings that are cut off where they end the response.
        """
        self._tokenizer, self._skip, self._stop = tokenizer, skip_special_tokens, stop
        self._text = ""
        self._context = self._read = 0
        """Tokens before `_read` are in the text. Those from `_context` on are decoded again: some tokenizers need them."""

    def certain(self, token_ids: Sequence[int]) -> str:
        """Return the certain text of all tokens so far; without a tokenizer there is none."""
        if self._tokenizer is not None:
            before = self._decode(token_ids[self._context : self._read])
            now = self._decode(token_ids[self._context :])
            if not now.endswith(_INCOMPLETE):
                self._text += now[len(before) :]
                self._context, self._read = self._read, len(token_ids)
        return self._text[: len(self._text) - max((_overlap(self._text, one) for one in self._stop), default=0)]

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=self._skip))


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`, without being all of it."""
    begin = max(len(text) - len(stop) + 1, 0)
    while (begin := text.find(stop[0], begin)) >= 0:
        if stop.startswith(text[begin:]):
            return len(text) - begin
        begin += 1
    return 0
