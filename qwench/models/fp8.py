"""Block-wise FP8 weights, in the layout of `Qwen/Qwen3-4B-FP8`.

    W [n, k] bfloat16  -->  weight [n, k] e4m3  and  weight_scale_inv [ceil(n / 128), ceil(k / 128)] float32
    W ~ weight * weight_scale_inv of its block;  the largest value of a block becomes 448, the largest of e4m3

The matrices of attention and feed-forward are quantized; embeddings, output layer, norms and biases stay as they are. Readers
take scales of any float dtype (Qwen's own are bfloat16); we write float32.

Source: DeepSeek-V3 (arXiv 2412.19437) section 3.3.2, `quant_method: fp8` with `weight_block_size` of transformers and SGLang.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qwench.errors import ConfigError
from qwench.models.memory import FP8_BLOCK
from qwench.samples import Json

FP8_DTYPE = torch.float8_e4m3fn
BLOCK = FP8_BLOCK
SCALE_DTYPE = torch.float32
QUANTIZATION_CONFIG: dict[str, Json] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
"""Entry of config.json for such weights."""
LARGEST = float(torch.finfo(FP8_DTYPE).max)
"""The largest e4m3 value, to which a block's largest value is scaled."""
_SCALE_SUFFIX = "_scale_inv"
_QUANTIZED = re.compile(r"\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$")


def is_fp8_config(config: Mapping[str, Json], *, where: str) -> bool:
    """Tell whether a config.json describes such weights.

    Raises:
        ConfigError: it describes weights that are quantized in another way.
    """
    said = config.get("quantization_config")
    if not said:
        return False
    if isinstance(said, dict) and said.get("quant_method") == "fp8" and said.get("weight_block_size") == [BLOCK, BLOCK]:
        return True
    raise ConfigError(
        f"{where} holds quantized weights of a kind that is not read: {said}; give bfloat16 or float32 weights, or FP8 in "
        f"blocks of {BLOCK} x {BLOCK} (qwench convert --to fp8)."
    )


def is_quantized_name(name: str) -> bool:
    """Tell whether the weight of this Hugging Face name is stored in FP8."""
    return _QUANTIZED.search(name) is not None


def is_scale_name(name: str) -> bool:
    """Tell whether this names the scales of a weight."""
    return name.endswith(".weight" + _SCALE_SUFFIX)


def scale_name(weight_name: str) -> str:
    """Return the name of a weight's scales."""
    return weight_name + _SCALE_SUFFIX


def weight_name(name: str) -> str:
    """Return the name of the weight that scales belong to."""
    return name.removesuffix(_SCALE_SUFFIX)


def scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the scales of a weight [n, k]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix [n, k] in e4m3 and its scales; computed where it lies, from its bfloat16 rounding."""
    if _has_kernels(weight):
        from qwench.models import fp8_triton  # noqa: PLC0415  # Triton exists only where CUDA does

        values = torch.empty(weight.shape, dtype=FP8_DTYPE, device=weight.device)
        scales = torch.empty(scale_shape(weight.shape), dtype=SCALE_DTYPE, device=weight.device)
        fp8_triton.quantize(weight.detach(), values, scales, largest=LARGEST, block=BLOCK)
        return values, scales
    rows, columns = weight.shape
    block_rows, block_columns = scale_shape(weight.shape)
    values = weight.detach().bfloat16().float()
    padded = functional.pad(values, (0, block_columns * BLOCK - columns, 0, block_rows * BLOCK - rows))
    blocks = padded.view(block_rows, BLOCK, block_columns, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    # By a tensor: on a GPU, torch divides by a number as it multiplies by its inverse, which is another last bit.
    scale = torch.where(largest > 0, largest / torch.full_like(largest, LARGEST), torch.ones_like(largest))
    scaled = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(FP8_DTYPE)
    return scaled.view(block_rows * BLOCK, block_columns * BLOCK)[:rows, :columns].contiguous(), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix [n, k] of e4m3 values times their scales, multiplied in float32 and rounded to `dtype`."""
    if _has_kernels(weight):
        from qwench.models import fp8_triton  # noqa: PLC0415  # Triton exists only where CUDA does

        matrix = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        fp8_triton.dequantize(weight, scale, matrix, block=BLOCK)
        return matrix
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (weight.float() * spread).to(dtype)


def quantized(buckets: Iterable[Sequence[tuple[str, Tensor]]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Replace each weight that is stored in FP8 by its e4m3 values and, right after them, its scales; pass on the others."""
    for bucket in buckets:
        replaced: list[tuple[str, Tensor]] = []
        for name, tensor in bucket:
            if is_quantized_name(name):
                values, scale = quantize(tensor)
                replaced += [(name, values), (scale_name(name), scale)]
            else:
                replaced.append((name, tensor))
        yield replaced


def _has_kernels(weight: Tensor) -> bool:
    """Tell whether Triton knows e4m3 there: from compute capability 8.9 on; AMD's GPUs before gfx950 have another format."""
    return weight.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(weight.device) >= (8, 9)
