"""Products with weight matrices, plain or block-wise FP8, fused where matrices that share their input lie back to back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qwench.models.decoder.products import linear
from qwench.models.fp8 import BLOCK, dequantize, scale_name

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of rows [T, K] with a matrix [N, K], and a bias [N] if there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """One weight matrix [N, K], or several on top of each other."""

    weight: Tensor
    scale: Tensor | None = None
    """[ceil(N / 128), ceil(K / 128)] float32 of an e4m3 weight."""
    bias: Tensor | None = None
    """[N]"""

    def __call__(self, x: Tensor, *, product: Product = linear) -> Tensor:
        """Return x [T, K] times the matrix, transposed: [T, N] in the dtype of x; `product` multiplies with a plain one."""
        if self.scale is None:
            return product(x, self.weight, self.bias)
        y = fp8_linear(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class Projection:
    """Matrices with one input: `(q, k, v) = projection(x)`."""

    def __init__(self, matrices: Sequence[Matrix], *, product: Product = linear) -> None:
        self._product = product
        self._sizes = tuple(matrix.weight.shape[0] for matrix in matrices)
        fused = _fuse(matrices)
        self._matrices = tuple(matrices) if fused is None else (fused,)

    @classmethod
    def bind(cls, weights: Mapping[str, Tensor], prefix: str, *names: str, product: Product = linear) -> Projection:
        """Bind to the weights `<prefix><name>.weight`, with their biases and scales if there are any."""
        return cls(
            [
                Matrix(
                    weight=weights[f"{prefix}{name}.weight"],
                    scale=weights.get(scale_name(f"{prefix}{name}.weight")),
                    bias=weights.get(f"{prefix}{name}.bias"),
                )
                for name in names
            ],
            product=product,
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return x [T, K] times each matrix, in one product if they are fused."""
        if len(self._sizes) == 1:
            return (self._matrices[0](x, product=self._product),)
        if len(self._matrices) == 1:
            parts: tuple[Tensor, ...] = self._matrices[0](x, product=self._product).split(self._sizes, dim=-1)
            return parts
        return tuple(matrix(x, product=self._product) for matrix in self._matrices)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return x [T, K] times an e4m3 matrix [N, K] in the dtype of x; activations are not quantized.

    The matrix takes half the memory and bandwidth. The product equals that with the dequantized weights.
    """
    if x.is_cuda:
        from qwench.models.decoder import linear_triton  # noqa: PLC0415  # Triton exists only where CUDA (or ROCm) does

        return linear_triton.fp8_linear(x, weight, scale)
    return linear(x, dequantize(weight, scale, x.dtype))


def _fuse(matrices: Sequence[Matrix]) -> Matrix | None:
    """Return one matrix over all of them, or None where they do not lie back to back, with biases and scales."""
    scales = [matrix.scale for matrix in matrices]
    if scales[0] is not None and any(matrix.weight.shape[0] % BLOCK for matrix in matrices):
        return None  # a block of scales would belong to two matrices
    weight = _fuse_neighbours([matrix.weight for matrix in matrices])
    scale = _fuse_neighbours([own for own in scales if own is not None]) if scales[0] is not None else None
    biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
    bias = _fuse_neighbours(biases) if biases else None
    # Matrices, scales and biases are fused together or not at all.
    if weight is None or (scales[0] is not None and scale is None) or (biases and bias is None):
        return None
    return Matrix(weight=weight, scale=scale, bias=bias)


def _fuse_neighbours(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return one tensor over tensors that lie back to back in one storage."""
    first = tensors[0]
    expected = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != expected or not tensor.is_contiguous():
            return None
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        expected += tensor.numel() * tensor.element_size()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
