"""The references' loss masks of conversations, for functions of users."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from qwench.data.chat import tokenize
from qwench.data.masks import build_mask_function
from qwench.samples import Json, Message


class MultiTurnLossMaskGenerator:
    """Tokens and loss mask of a conversation, by the rules of --loss-mask-type."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokenizer_type: str = "qwen") -> None:
        self.tokenizer = tokenizer
        self._mask = build_mask_function(tokenizer_type, tokenizer)

    def get_loss_mask(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> tuple[list[int], list[int]]:
        """Return token ids and, for each, whether it is trained on."""
        segments = self._mask(messages, tools, "a conversation")
        parts = tokenize(self.tokenizer, [segment.text for segment in segments])
        pairs = list(zip(segments, parts, strict=True))
        return [one for _, ids in pairs for one in ids], [int(segment.trained) for segment, ids in pairs for _ in ids]

    def get_response_lengths(self, loss_masks: Sequence[list[int]]) -> list[int]:
        """Return the lengths from the first trained token to the end."""
        return [len(mask) - mask.index(1) if 1 in mask else 0 for mask in loss_masks]

    def get_text_from_loss_mask(self, token_ids: Sequence[int], loss_masks: Sequence[int]) -> list[str]:
        """Return the trained stretches as text."""
        runs = groupby(zip(token_ids, loss_masks, strict=True), key=lambda pair: pair[1] == 1)
        return [str(self.tokenizer.decode([token for token, _ in run])) for is_trained, run in runs if is_trained]
