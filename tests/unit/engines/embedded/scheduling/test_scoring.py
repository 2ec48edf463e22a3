"""What a request may want scored."""

from __future__ import annotations

import pytest
import torch

from qwench.engines.embedded.scheduling.scoring import check_scoring, read_scores, score_rows
from qwench.engines.protocol import Scores, Scoring
from qwench.errors import EngineError


@pytest.mark.parametrize(
    ("kept", "refused", "said"),
    [
        ({"start": 1}, {"start": 0}, r"scores from token 0 on; it must lie in \[1, 2\), in the prompt"),
        ({"start": 1}, {"start": 2}, "scores from token 2 on"),
        ({"start": 1, "top_k": 8}, {"start": 1, "top_k": 9}, r"the 9 likeliest tokens of a position; it must lie in \[0, 8\]"),
        ({"start": 1, "top_k": 0}, {"start": 1, "top_k": -1}, "the -1 likeliest"),
        ({"start": 1, "token_ids": (0, 7)}, {"start": 1, "token_ids": (8,)}, r"token ids outside \[0, 8\)"),
        ({"start": 1, "token_ids": (0, 7)}, {"start": 1, "token_ids": (-1,)}, r"token ids outside \[0, 8\)"),
    ],
)
def test_bounds_of_what_is_scored(kept, refused, said) -> None:
    check_scoring(Scoring(**kept), [5, 6], vocab_size=8, name="one")
    with pytest.raises(EngineError, match=f"^one .*{said}"):
        check_scoring(Scoring(**refused), [5, 6], vocab_size=8, name="one")
    with pytest.raises(EngineError, match=r"the 1025 likeliest .* \[0, 1024\]"):
        check_scoring(Scoring(start=1, top_k=1025), [5, 6], vocab_size=2000, name="one")


@pytest.mark.parametrize("scoring", [Scoring(start=1, top_k=2, token_ids=(3, 0)), Scoring(start=1), Scoring(start=1, top_k=1)])
def test_scores_of_chunks_are_read_as_those_of_the_prompt(scoring) -> None:
    rows = torch.tensor([[-1.0, -2.0, -0.5, -4.0], [-0.25, -3.0, -2.5, -1.5], [-5.0, -0.75, -6.0, -1.25]])
    chunks = [score_rows(rows[:2], torch.tensor([1, 3]), scoring), score_rows(rows[2:], torch.tensor([0]), scoring)]
    best = [[(-0.5, 2), (-1.0, 0)], [(-0.25, 0), (-1.5, 3)], [(-0.75, 1), (-1.25, 3)]]
    assert read_scores(chunks, scoring) == Scores(
        log_probs=[-2.0, -1.5, -5.0],
        top=[row[: scoring.top_k] for row in best] if scoring.top_k else (),
        of_token_ids=[[-4.0, -1.0], [-1.5, -0.25], [-1.25, -5.0]] if scoring.token_ids else (),
    )


def test_more_named_tokens_than_can_be_scored_are_refused() -> None:
    check_scoring(Scoring(start=1, token_ids=(7,) * 1024), [5, 6], vocab_size=8, name="one")
    with pytest.raises(EngineError, match="one wants log-probs of 1025 token ids; at most 1024 are scored"):
        check_scoring(Scoring(start=1, token_ids=(7,) * 1025), [5, 6], vocab_size=8, name="one")
