"""Products and attention whose rows have the same bits in every batch, for CPUs.

A matrix product of another height adds in another order. So rows are computed in tiles of one height, and keys in blocks of
one width; the sums over blocks run in order. Keys that a query does not see add exact zeros:

    decode of one token, prefill of a prompt, pass over a packed micro-batch -> equal log-probs, bit by bit
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TILE = 16
"""Rows of a product, and queries of a tile."""
KEY_BLOCK = 64


def padded(x: Tensor) -> Tensor:
    """Return [T, ...] with rows of zeros up to a multiple of TILE."""
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, -len(x) % TILE))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [T, K] times the matrix [N, K], transposed."""
    tiles = [functional.linear(tile, weight, bias) for tile in padded(x).split(TILE)]
    return torch.cat(tiles)[: len(x)] if tiles else x.new_zeros((0, len(weight)))


def attend(queries: Tensor, keys: Tensor, values: Tensor, last_seen: Tensor, *, scale: float) -> Tensor:
    """Return the attention of tiles of queries, each with its own keys; float32 inside.

    Args:
        queries: [N, TILE, H, K]
        keys: [N, L, KV, K], as `values`; L is a multiple of KEY_BLOCK, and finite where no query sees a key.
        last_seen: [N, TILE] index of the last key that a query sees.

    Returns:
        [N, TILE, H, K] in the dtype of the queries.
    """
    num_tiles, _, num_heads, _ = queries.shape
    length, kv_heads = keys.shape[1:3]
    group = num_heads // kv_heads
    q = _by_kv_head(_grouped(queries.float(), group))
    k, v = _by_kv_head(keys.float()), _by_kv_head(values.float())
    seen = torch.arange(length, device=keys.device) <= last_seen.repeat_interleave(group, dim=1)[:, :, None]
    seen = seen.repeat_interleave(kv_heads, dim=0)
    blocks = [slice(start, start + KEY_BLOCK) for start in range(0, length, KEY_BLOCK)]
    scores = torch.cat([torch.bmm(q, k[:, block].transpose(1, 2)) for block in blocks], dim=-1) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    total, attended = torch.zeros_like(q[..., :1]), torch.zeros_like(q)
    for block in blocks:
        total = total + weights[..., block].sum(-1, keepdim=True)
        attended = attended + torch.bmm(weights[..., block], v[:, block])
    attended = (attended / total).unflatten(0, (num_tiles, kv_heads)).unflatten(2, (TILE, group))
    tiles: Tensor = attended.permute(0, 2, 1, 3, 4).reshape(queries.shape).to(queries.dtype)
    return tiles


def _grouped(queries: Tensor, group: int) -> Tensor:
    """Return [N, TILE * group, KV, K]: the queries of the heads that share keys follow each other."""
    grouped: Tensor = queries.unflatten(2, (-1, group)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return grouped


def _by_kv_head(tensor: Tensor) -> Tensor:
    """Return [N * KV, rows, K] of [N, rows, KV, K]."""
    return tensor.transpose(1, 2).flatten(0, 1).contiguous()
