"""Log-probs of prompt tokens: a request is prefilled, scored on the way, and generates nothing.

Position p of a prompt predicts token p + 1. With `Scoring.start` 3 and chunks of 2 tokens:

    chunk       0 1 | 2 3 | 4 5        positions 2, 3 and 4 score tokens 3, 4 and 5
    scored          | 3 4 | 5

A matrix [n, 1 + 2 k + m] float32 holds the scores of a chunk: the token's log-prob, then the log-probs and the ids of the k
likeliest tokens, then the log-probs of the m tokens asked for. Ids below 2**24 are exact in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from qwench.engines.protocol import Scores, Scoring
from qwench.errors import EngineError

MAX_TOP_K = 1024
MAX_TOKEN_IDS = 1024
"""Each is a number at every scored position."""


def check_scoring(scoring: Scoring, input_ids: Sequence[int], *, vocab_size: int, name: str) -> None:
    """Check what a request wants scored.

    Raises:
        EngineError: a token that the prompt or the vocabulary does not have.
    """
    most = min(MAX_TOP_K, vocab_size)
    if not 1 <= scoring.start < len(input_ids):
        raise EngineError(f"{name} scores from token {scoring.start} on; it must lie in [1, {len(input_ids)}), in the prompt.")
    if not 0 <= scoring.top_k <= most:
        raise EngineError(f"{name} wants the {scoring.top_k} likeliest tokens of a position; it must lie in [0, {most}].")
    if len(scoring.token_ids) > MAX_TOKEN_IDS:
        raise EngineError(f"{name} wants log-probs of {len(scoring.token_ids)} token ids; at most {MAX_TOKEN_IDS} are scored.")
    if any(not 0 <= token < vocab_size for token in scoring.token_ids):
        raise EngineError(f"{name} wants log-probs of token ids outside [0, {vocab_size}).")


def score_rows(log_probs_NV: Tensor, labels_N: Tensor, scoring: Scoring) -> Tensor:
    """Return the matrix of the module docstring for N positions."""
    columns = [log_probs_NV.gather(-1, labels_N.long()[:, None])]
    if scoring.top_k:
        values, ids = log_probs_NV.topk(scoring.top_k, dim=-1)
        columns += [values, ids.float()]
    if scoring.token_ids:
        columns.append(log_probs_NV[:, torch.tensor(scoring.token_ids, device=log_probs_NV.device)])
    return torch.cat(columns, dim=-1)


def read_scores(matrices: Sequence[Tensor], scoring: Scoring) -> Scores:
    """Return the scores of a whole prompt from those of its chunks."""
    k = scoring.top_k
    rows: list[list[float]] = list(chain.from_iterable(matrix.tolist() for matrix in matrices))
    return Scores(
        log_probs=[row[0] for row in rows],
        top=[list(zip(row[1 : 1 + k], map(int, row[1 + k : 1 + 2 * k]), strict=True)) for row in rows] if k else (),
        of_token_ids=[row[1 + 2 * k :] for row in rows] if scoring.token_ids else (),
    )
