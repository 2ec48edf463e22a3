# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""The head on Hopper GPUs: products whose logits stay in the registers that accumulated them in float32.

    scores:    hidden [C, D], head [V, D] -> tiles of logits -> three sums of each row and tile -> log-probs, entropies [C]
                                                    \\-> on request: weights [C, V] bfloat16
    gradient:  hidden, head, scores -> tiles of logits -> gradient of the logits [C, V] bfloat16

In kernels z is logit / temperature / log 2. The weights of a row are e_j = 2^(z_j - r) with a reference r that is known before
the product, so that p_j = c e_j with one c for the row. The entry of its label y is (p_y - 1) / c instead of e_y, because
p_y - 1 would have no digits left where p_y was rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG_2 = math.log(2.0)
_SCORES, _WEIGHTS, _GRADIENT = 0, 1, 2
_SAMPLED = 512
"""Columns, besides the label, of which the reference of a row knows the largest logit."""
_ABOVE = 88.0
"""The reference is the largest known z plus this. Weights from 2^-126 to 2^120 are stored: those of probabilities below 2^-38
may be lost, and a gradient is too small where the largest z is over 208 above the largest known one, 144 in units of logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How a product is cut up."""

    rows: int
    columns: int
    stages: int
    parts: int = 1
    """Into which a tile is split when it is stored."""
    flatten: bool = True
    """Factors of the next tile are loaded while the sums of one are made."""


# The fastest of 12 or 13 on an H200 at [4096, 1024] x [151936, 1024]. Every tile has 128 float32 logits a thread.
SCORES_TILES = Tiles(rows=256, columns=128, stages=4)
WEIGHTS_TILES = Tiles(rows=128, columns=256, stages=4, parts=2, flatten=False)
GRADIENT_TILES = Tiles(rows=128, columns=256, stages=3)
_DEPTH = 64
_HEIGHT = 32
"""Tiles of rows that are multiplied by a column of tiles before the next one."""


def are_aligned(*factors: Tensor) -> bool:
    """Tell whether the kernels can read these factors: rows of bfloat16 back to back, from a multiple of 16 bytes on."""
    return all(x.dtype == torch.bfloat16 and x.is_contiguous() and x.data_ptr() % 16 == 0 for x in factors)


def scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, *, keep: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Return what `head_elementwise.statistics` does, and on request weights [C, V] and log c [C] for `kept_gradient`."""
    tiles = WEIGHTS_TILES if keep else SCORES_TILES
    num_rows, depth = hidden.shape
    log_probs, entropies, normalizers, label_z = torch.empty((4, num_rows), dtype=torch.float32, device=hidden.device)
    columns = log_probs, entropies, normalizers
    if not num_rows:
        return columns, (_matrix(hidden, weight), label_z) if keep else None
    scale = 1.0 / (temperature * LOG_2)
    _label_z[(num_rows,)](hidden, weight, labels, label_z, scale, DEPTH=depth, BLOCK=triton.next_power_of_2(depth))
    sums = torch.empty((triton.cdiv(len(weight), tiles.columns), 3, num_rows), dtype=torch.float32, device=hidden.device)
    if keep:
        sampled = (hidden @ weight[:: -(-len(weight) // _SAMPLED)].T).amax(1).float() * scale
        reference, weights = torch.maximum(sampled, label_z) + _ABOVE, _matrix(hidden, weight)
        _multiply(hidden, weight, weights, _WEIGHTS, temperature, tiles, sums=sums, row=reference)
    else:
        _multiply(hidden, weight, None, _SCORES, temperature, tiles, sums=sums, row=label_z)
    merged = 32
    _merge[(triton.cdiv(num_rows, merged),)](
        sums, label_z, log_probs, entropies, normalizers, num_rows, len(sums), BLOCK_T=64, BLOCK_M=merged
    )
    if not keep:
        return columns, None
    log_c = (reference * LOG_2 - normalizers).clamp(min=-120.0 * LOG_2)
    _write_labels(weights, labels, torch.expm1(log_probs) * torch.exp(-log_c))
    return columns, (weights, log_c)


def gradient(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    columns: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    temperature: float,
) -> Tensor:
    """Return the gradient [C, V] of the logits in bfloat16, from `scores` and the gradients of log-probs and entropies."""
    output = _matrix(hidden, weight)
    if len(hidden):
        _, entropies, normalizers = columns
        _multiply(
            hidden, weight, output, _GRADIENT, temperature, GRADIENT_TILES,
            row=normalizers / LOG_2, entropies=entropies / LOG_2, grads=grads,
        )  # fmt: skip
        _write_labels(output, labels, _label_gradient(columns, grads, temperature))
    return output


def kept_gradient(
    kept: tuple[Tensor, Tensor],
    labels: Tensor,
    columns: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    temperature: float,
) -> tuple[Tensor, Tensor | None]:
    """Return a matrix [C, V] in the memory of the weights, and factors [C] of its rows: together the gradient of the logits.

    Without a gradient of entropies the weights are that matrix as they are.
    """
    weights, log_c = kept
    grad_log_probs, grad_entropies = grads
    if grad_entropies is None:
        return weights, grad_log_probs * torch.exp(log_c) / -temperature
    num_rows, size = weights.shape
    block = 4096
    if num_rows:
        _finish[(num_rows * triton.cdiv(size, block),)](
            weights, log_c, columns[1], grad_log_probs.contiguous(), grad_entropies.contiguous(),
            weights.stride(0), size, 1.0 / temperature, BLOCK=block, num_warps=8,
        )  # fmt: skip
        _write_labels(weights, labels, _label_gradient(columns, grads, temperature))
    return weights, None


def _matrix(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return memory for [C, V], whose rows begin at multiples of 16 bytes."""
    return torch.empty(len(hidden), -(-len(weight) // 8) * 8, dtype=torch.bfloat16, device=hidden.device)[:, : len(weight)]


def _write_labels(matrix: Tensor, labels: Tensor, values: Tensor) -> None:
    matrix.scatter_(1, labels[:, None], values[:, None].to(matrix.dtype))


def _label_gradient(columns: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor | None], temperature: float) -> Tensor:
    log_probs, entropies, _ = columns
    grad_log_probs, grad_entropies = grads
    result = -torch.expm1(log_probs) * grad_log_probs
    if grad_entropies is not None:
        result -= log_probs.exp() * (log_probs + entropies) * grad_entropies
    return result / temperature


def _multiply(
    hidden: Tensor,
    weight: Tensor,
    output: Tensor | None,
    mode: int,
    temperature: float,
    tiles: Tiles,
    *,
    row: Tensor,
    sums: Tensor | None = None,
    entropies: Tensor | None = None,
    grads: tuple[Tensor, Tensor | None] | None = None,
) -> None:
    """Launch the product; a pointer that its mode does not read is `row`."""
    num_rows, depth = hidden.shape
    size = len(weight)
    programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    grad_log_probs, grad_entropies = grads or (row, None)
    factors = (TensorDescriptor.from_tensor(x, [n, _DEPTH]) for x, n in ((hidden, tiles.rows), (weight, tiles.columns)))
    stored = [tiles.rows, tiles.columns // tiles.parts]
    _head_product[(min(programs, triton.cdiv(num_rows, tiles.rows) * triton.cdiv(size, tiles.columns)),)](
        *factors,
        None if output is None else TensorDescriptor.from_tensor(output, stored),
        row if sums is None else sums,
        row,
        row if entropies is None else entropies,
        grad_log_probs.contiguous(),
        row if grad_entropies is None else grad_entropies.contiguous(),
        num_rows,
        size,
        1.0 / (temperature * LOG_2),
        1.0 / temperature,
        DEPTH=depth,
        MODE=mode,
        EVEN=size % tiles.columns == 0,
        HAS_ENTROPY=grad_entropies is not None,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_K=_DEPTH,
        HEIGHT=_HEIGHT,
        PARTS=tiles.parts,
        FLATTEN=tiles.flatten,
        num_warps=8,
        num_stages=tiles.stages,
    )


@triton.jit
def _head_product(
    hidden, weight, output, sums, row_z, entropy, grad_log_prob, grad_entropy, num_rows, size, scale, inverse_temperature,
    DEPTH: tl.constexpr, MODE: tl.constexpr, EVEN: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HEIGHT: tl.constexpr, PARTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Programs take tiles in turn. HEIGHT tiles of rows go over all columns, so that these rows stay in the L2 cache."""
    tile_rows, tile_columns = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(size, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tile_rows * tile_columns, tl.num_programs(0), flatten=FLATTEN):
        first = tile // (HEIGHT * tile_columns) * HEIGHT
        height = tl.minimum(tile_rows - first, HEIGHT)
        inside = tile - first * tile_columns
        row, tile_column = (first + inside % height) * BLOCK_M, inside // height
        column = tile_column * BLOCK_N
        logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, DEPTH, BLOCK_K):
            logits = tl.dot(hidden.load([row, k]), weight.load([column, k]).T, logits)
        rows = row + tl.arange(0, BLOCK_M)
        real = rows < num_rows
        z_of_row = tl.load(row_z + rows, mask=real, other=0.0)
        if MODE == 2:  # the row's z is the log of its sum
            log_prob = logits * scale - z_of_row[:, None]
            slope = -inverse_temperature * tl.load(grad_log_prob + rows, mask=real, other=0.0)
            if HAS_ENTROPY:
                change = -0.6931471805599453 * inverse_temperature * tl.load(grad_entropy + rows, mask=real, other=0.0)
                slope += change * tl.load(entropy + rows, mask=real, other=0.0)
                values = tl.exp2(log_prob) * (change[:, None] * log_prob + slope[:, None])
            else:
                values = tl.exp2(log_prob) * slope[:, None]
        else:
            if not EVEN:  # noqa: SIM102 - the outer condition is decided when the kernel is compiled
                if column + BLOCK_N > size:
                    logits = tl.where((column + tl.arange(0, BLOCK_N) < size)[None, :], logits, -1e30)
            largest = tl.max(logits, 1) * scale
            difference = logits * scale - largest[:, None]
            values = tl.exp2(difference)
            place = sums + tile_column.to(tl.int64) * 3 * num_rows + rows
            tl.store(place, largest, mask=real)
            tl.store(place + num_rows, tl.sum(values, 1), mask=real)
            tl.store(place + 2 * num_rows, tl.sum(difference * values, 1), mask=real)
            if MODE == 1:  # the row's z is its reference
                values *= tl.exp2(tl.minimum(largest - z_of_row, 120.0))[:, None]
        if MODE != 0:
            if PARTS == 1:
                output.store([row, column], values.to(tl.bfloat16))
            else:
                left, right = values.reshape((BLOCK_M, 2, BLOCK_N // 2)).permute((0, 2, 1)).split()
                output.store([row, column], left.to(tl.bfloat16))
                output.store([row, column + BLOCK_N // 2], right.to(tl.bfloat16))


@triton.jit
def _label_z(hidden, weight, labels, output, scale, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(hidden + row * DEPTH + k, mask=k < DEPTH, other=0.0).to(tl.float32)
    w = tl.load(weight + tl.load(labels + row) * DEPTH + k, mask=k < DEPTH, other=0.0).to(tl.float32)
    tl.store(output + row, tl.sum(x * w, 0) * scale)


@triton.jit
def _merge(sums, label_z, log_prob, entropy, normalizer, num_rows, num_tiles, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """With m the largest z, s the sum of 2^(z - m) and w of (z - m) 2^(z - m): lse = m + log2 s, H = log2 s - w / s."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = rows < num_rows
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        mask = (tiles < num_tiles)[:, None] & real[None, :]
        place = sums + tiles.to(tl.int64)[:, None] * 3 * num_rows + rows[None, :]
        m = tl.load(place, mask=mask, other=-1e30)
        s = tl.load(place + num_rows, mask=mask, other=0.0)
        w = tl.load(place + 2 * num_rows, mask=mask, other=0.0)
        new_largest = tl.maximum(largest, tl.max(m, 0))
        shift, shifts = tl.maximum(largest - new_largest, -1e4), tl.maximum(m - new_largest[None, :], -1e4)
        shrink, shrinks = tl.exp2(shift), tl.exp2(shifts)
        weighted = shrink * (weighted + shift * total) + tl.sum(shrinks * (w + shifts * s), 0)
        total = shrink * total + tl.sum(shrinks * s, 0)
        largest = new_largest
    log_total = tl.log2(total)
    natural: tl.constexpr = 0.6931471805599453
    tl.store(log_prob + rows, (tl.load(label_z + rows, mask=real, other=0.0) - largest - log_total) * natural, mask=real)
    tl.store(entropy + rows, (log_total - weighted / total) * natural, mask=real)
    tl.store(normalizer + rows, (largest + log_total) * natural, mask=real)


@triton.jit
def _finish(weights, log_c, entropy, grad_log_prob, grad_entropy, stride, size, inverse_temperature, BLOCK: tl.constexpr):
    """Turn weights e of a row into the gradient of its logits, with p = c e."""
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place = weights + row * stride + column
    e = tl.load(place, mask=column < size, other=0.0).to(tl.float32)
    row_log_c = tl.load(log_c + row)
    log_p = tl.log(tl.maximum(e, 1e-37)) + row_log_c
    slope = tl.load(grad_log_prob + row) + tl.load(grad_entropy + row) * (log_p + tl.load(entropy + row))
    result = e * (-inverse_temperature * tl.exp(row_log_c)) * slope
    tl.store(place, result.to(weights.dtype.element_ty), mask=column < size)
