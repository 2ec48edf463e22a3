"""Draws the next tokens of all rows at once, each by its own parameters, and their log-probs.

The draw of a token depends on its row's logits, the request's seed and the token's position in the response alone. A
counter-based hash gives one uniform number. The inverse of the cumulative distribution turns it into a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.embedded.scheduling.uniform import uniform
from qwench.engines.protocol import SamplingParams

CDF_BLOCK = 128
"""Vocabulary entries of one block of the two-level inverse CDF: only one block per row is summed in float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRows:
    """Parameters of the rows to draw, on the host."""

    temperature: np.ndarray
    """[S] float32; 0 is greedy."""
    top_p: np.ndarray
    top_k: np.ndarray
    """[S]; below 1 is off."""
    min_p: np.ndarray
    uniforms: np.ndarray
    """[S] float64 in [0, 1)."""
    keeps_support: np.ndarray
    """[S] bool"""
    forbidden: Sequence[tuple[int, int]] = ()
    """(row, token) pairs that must not be drawn: stop tokens before `min_new_tokens`."""

    def select(self, which: np.ndarray) -> SamplingRows:
        """Return the parameters of some of the rows."""
        place = {row: index for index, row in enumerate(which.tolist())}
        return SamplingRows(
            temperature=self.temperature[which],
            top_p=self.top_p[which],
            top_k=self.top_k[which],
            min_p=self.min_p[which],
            uniforms=self.uniforms[which],
            keeps_support=self.keeps_support[which],
            forbidden=[(place[row], token) for row, token in self.forbidden if row in place],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """The input of a draw: each request's parameters, and its row in the scheduler's table."""

    params: SamplingRows
    rows: np.ndarray
    """[S] int32"""
    support: dict[int, list[int]] = field(default_factory=dict)
    """Index of a request -> the tokens that were kept; the draw writes it."""

    @property
    def limited(self) -> np.ndarray:
        """Return the indices of requests whose support is limited; only `sample` draws for them."""
        params = self.params
        limited = (params.top_k >= 1) | (params.top_p < 1) | (params.min_p > 0)
        limited[[row for row, _ in params.forbidden]] = True
        return np.flatnonzero(limited)

    def packed(self, num_rows: int, *, scratch_row: int) -> np.ndarray:
        """Return `DrawInputs` in one int32 array, with padding that draws for the scratch row."""
        padding = num_rows - len(self.rows)
        columns = (self.params.uniforms, 0.0), (self.params.temperature, 1.0), (self.rows, scratch_row)
        return np.concatenate([np.pad(column, (0, padding), constant_values=fill).view(np.int32) for column, fill in columns])


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawInputs:
    """Device tensors of `Draws`."""

    uniforms: Tensor
    """[R] float64"""
    temperature: Tensor
    """[R] float32"""
    rows: Tensor
    """[R] int32"""

    @classmethod
    def view(cls, buffer: Tensor, num_rows: int) -> DrawInputs:
        """Return the parts of a packed array on the device."""
        uniforms, temperature, rows = buffer.split([2 * num_rows, num_rows, num_rows])
        return cls(uniforms=uniforms.view(torch.float64), temperature=temperature.view(torch.float32), rows=rows)


def draws_of(requests: Sequence[RunningRequest]) -> Draws:
    """Collect the draws of the next token of each request.

    A request whose parameters cannot be read gets `failure`, and its draw is ignored.
    """
    rows = np.array([request.row for request in requests], dtype=np.int32)
    try:
        params = sampling_rows(requests)
    except Exception:  # noqa: BLE001 - the fault of one request is not that of the others
        params = sampling_rows([request if _can_be_read(request) else _greedy(request) for request in requests])
    return Draws(params=params, rows=rows)


def _can_be_read(request: RunningRequest) -> bool:
    try:
        sampling_rows([request])
    except Exception as cause:  # noqa: BLE001 - see draws_of
        request.failure = cause
        return False
    return True


def _greedy(request: RunningRequest) -> RunningRequest:
    harmless = replace(request.request, sampling=SamplingParams(max_new_tokens=1, temperature=0.0))
    return replace(request, request=harmless, seed=0, stop_ids=frozenset())


def draw_limited(logits_SV: Tensor, draws: Draws, which: np.ndarray, last_tokens: Tensor, drawn: Tensor) -> None:
    """Draw for some of the requests; write tokens to their rows of `last_tokens`, and tokens and log-prob bits to `drawn`.

    Args:
        which: indices of the requests.
        last_tokens: [rows] int32
        drawn: [2, S] int32
    """
    if len(which) == 0:
        return
    index, rows = (torch.from_numpy(array).to(logits_SV.device) for array in (which, draws.rows[which].astype(np.int64)))
    logits_of_some = logits_SV if len(which) == len(draws.rows) else logits_SV[index]
    tokens, log_probs, support = sample(logits_of_some, draws.params.select(which))
    last_tokens[rows] = tokens.int()
    drawn[0, index], drawn[1, index] = tokens.int(), log_probs.view(torch.int32)
    draws.support.update({int(which[row]): ids for row, ids in support.items()})


def sampling_rows(requests: Sequence[RunningRequest]) -> SamplingRows:
    """Collect the parameters of the next token of each request."""
    params = [request.request.sampling for request in requests]
    positions = np.array([request.num_sampled for request in requests], dtype=np.uint64)
    seeds = np.array([request.seed for request in requests], dtype=np.uint64)
    return SamplingRows(
        temperature=np.array([p.temperature for p in params], dtype=np.float32),
        top_p=np.array([p.top_p for p in params], dtype=np.float32),
        top_k=np.array([p.top_k for p in params], dtype=np.int64),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        uniforms=uniform(seeds, positions),
        keeps_support=np.array([p.keeps_support for p in params], dtype=bool),
        forbidden=[
            (row, token)
            for row, request in enumerate(requests)
            if params[row].min_new_tokens > request.num_sampled
            for token in request.stop_ids
        ],
    )


def sample(logits_SV: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor, dict[int, list[int]]]:
    """Return tokens [S] int64 and their log-probs [S] float32, and the kept tokens of rows that ask; the logits are float32.

    Log-probs are those of the whole vocabulary at the sampling temperature (1 where greedy), before anything is cut off. Rows
    that ask for the kept tokens get those that are normalised over them.
    """
    device = logits_SV.device
    greedy = rows.temperature == 0
    scaled = logits_SV
    if not np.all(greedy | (rows.temperature == 1)):
        scaled = scaled / torch.from_numpy(np.where(greedy, np.float32(1), rows.temperature)).to(device)[:, None]
    normaliser_S1 = scaled.logsumexp(dim=-1, keepdim=True)
    allowed = scaled
    if rows.forbidden:
        allowed = scaled.clone()
        forbidden = torch.tensor(rows.forbidden, device=device)
        allowed[forbidden[:, 0], forbidden[:, 1]] = float("-inf")
    probs = None
    if greedy.all():
        tokens = allowed.argmax(dim=-1)
    else:
        probs = _kept_probs(allowed, rows)
        tokens = inverse_cdf(probs, torch.from_numpy(rows.uniforms).to(device))
        if greedy.any():
            tokens = torch.where(torch.from_numpy(greedy).to(device), allowed.argmax(dim=-1), tokens)
    log_probs = (scaled.gather(-1, tokens[:, None]) - normaliser_S1).squeeze(-1)
    asking = np.flatnonzero(rows.keeps_support & _is_cut(rows))
    if probs is None or not len(asking):
        return tokens, log_probs, {}
    index = torch.from_numpy(asking).to(device)
    kept = probs[index] > 0
    log_masses = scaled[index].masked_fill(~kept, float("-inf")).logsumexp(dim=-1)
    log_probs[index] = scaled[index, tokens[index]] - log_masses
    counts, ids = kept.sum(dim=-1).tolist(), kept.nonzero()[:, 1].cpu()
    return tokens, log_probs, {row: one.tolist() for row, one in zip(asking.tolist(), ids.split(counts), strict=True)}


def _is_cut(rows: SamplingRows) -> np.ndarray:
    """Tell of each row whether top-k, top-p or min-p cut something off."""
    return (rows.temperature > 0) & ((rows.top_k >= 1) | (rows.top_p < 1) | (rows.min_p > 0))


def truncate(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what top-k, top-p and min-p cut off, each judged on the same normalised distribution [S, V].

    top-p keeps the smallest set of most likely tokens whose mass reaches it; min-p keeps tokens with at least that share of
    the most likely one's probability; the most likely token always stays.
    """
    probs = probs / probs.sum(dim=-1, keepdim=True)
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    rank = torch.arange(probs.shape[-1], device=probs.device)
    vocabulary = torch.full_like(top_k, probs.shape[-1])
    kept = rank < torch.where(top_k < 1, vocabulary, top_k)[:, None]
    kept &= (mass_before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept &= ordered >= min_p[:, None] * ordered[:, :1]
    kept[:, 0] = True
    return torch.zeros_like(probs).scatter_(-1, order, ordered * kept)


def _kept_probs(allowed: Tensor, rows: SamplingRows) -> Tensor:
    """Return weights of the draw: probabilities, 0 where a token must not be drawn or is cut off."""
    device = allowed.device
    probs = allowed.softmax(dim=-1)
    cut = _is_cut(rows)
    if cut.any():
        index = torch.from_numpy(cut.nonzero()[0]).to(device)
        limits = [torch.from_numpy(values[cut]).to(device) for values in (rows.top_k, rows.top_p, rows.min_p)]
        probs[index] = truncate(probs[index], *limits)
    return probs


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return, for each row of non-negative weights [S, V], the first index whose share of the running sum exceeds the uniform.

    Entries of weight 0 are never returned.
    """
    padding = -weights.shape[-1] % CDF_BLOCK
    whole = functional.pad(weights, (0, padding)) if padding else weights
    blocks = whole.unflatten(-1, (-1, CDF_BLOCK))
    block, rest = _locate(blocks.sum(dim=-1).double(), uniforms)
    chosen = blocks.gather(1, block[:, None, None].expand(-1, 1, CDF_BLOCK)).squeeze(1).double()
    inside, _ = _locate(chosen, rest)
    return block * CDF_BLOCK + inside


def _locate(weights: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index where each share of the row's sum falls, and how far into that entry it falls, in [0, 1)."""
    running = weights.cumsum(dim=-1)
    total = running[:, -1:]
    target = shares[:, None] * total
    # Rounding may put the target on the total: then the entry that completes it, the last of positive weight, is meant.
    index = ((running > target) | (running >= total)).int().argmax(dim=-1, keepdim=True)
    weight = weights.gather(-1, index)
    before = running.gather(-1, index) - weight
    rest = ((target - before) / weight).clamp(0.0, 1.0 - 2.0**-53)
    return index.squeeze(-1), rest.squeeze(-1)


NO_DRAWS = draws_of([])
