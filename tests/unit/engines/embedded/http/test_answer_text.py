"""What a stop string leaves of a response's text."""

from __future__ import annotations

import pytest

from qwench.engines.embedded.http.api import answer_text
from qwench.engines.protocol import FinishReason, GenerateResult
from qwench.models.built_tokenizers import build_small_tokenizer

TOKENIZER = build_small_tokenizer()


@pytest.mark.parametrize(
    ("tokens", "stop", "skips", "expected"),
    [
        (["1", "7", "<|endoftext|>"], "<|endoftext|>", False, "17"),
        (["1", "7", "<|endoftext|>"], "<|endoftext|>", True, "17"),  # the text has no trace of it
        (["1", "7", "\n\n"], "\n", True, "17"),  # the last token has it twice
        (["1", "\n\n", "7", "7"], "77", True, "1\n\n"),
        (["\n", "1", "\n"], "\n", True, "\n1"),  # --min-new-tokens let the first one pass
    ],
)
def test_the_text_ends_where_the_stop_string_begins(tokens, stop, skips, expected):
    ids = TOKENIZER.convert_tokens_to_ids(tokens)
    if None in ids or TOKENIZER.unk_token_id in ids:
        ids = [one for token in tokens for one in TOKENIZER(token)["input_ids"]]
    result = GenerateResult(
        request_id="r",
        output_ids=ids,
        log_probs=[0.0] * len(ids),
        finish_reason=FinishReason.STOP,
        matched=stop,
        weight_versions=[0] * len(ids),
        text=TOKENIZER.decode(ids, skip_special_tokens=skips),
    )
    assert answer_text(result, TOKENIZER, skip_special_tokens=skips) == expected
