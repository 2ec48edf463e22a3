"""Forward and backward of a dense decoder over packed sequences, written out, with float32 sums of the weights' gradients.

    x, delta --add, norm--> qkv --norm, rotate, attend--> output --add, norm--> gate, up --silu--> down = delta

Autograd is not used. Products add their weight gradients to the float32 sums. Matrices that share an input are one product.
`Keep` chooses what a layer keeps between the passes. Matrices whose sums have no rows are frozen; adapters may be beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from qwench.algorithms.log_probs import add_product
from qwench.models.architecture import Architecture
from qwench.models.decoder import elementwise, gradients
from qwench.models.decoder.gradients import Heads, QkNorms
from qwench.models.decoder.invariant import linear
from qwench.models.decoder.rope import rope_table
from qwench.training.packed_adapters import NO_ADAPTERS, LayerAdapters, PackedAdapter


class Keep(Enum):
    """What a layer keeps for its backward, besides its input."""

    ALL = "all"
    """Every input of a product and of the attention."""
    PRODUCTS = "products"
    """Outputs of products and of the attention; norms, rotations and activations are computed again: 2 to 3 % more time."""
    NOTHING = "nothing"
    """The whole forward is computed again, at a third of the products' time."""


class Attention(Protocol):
    """Attention of the sequences of one micro-batch, with its backward."""

    def forward(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, *, scale: float) -> tuple[Tensor, Any]:
        """Return [T, H, K], and what the backward needs besides inputs and output; rows of values may have strides."""
        ...

    def backward(
        self, grad_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, output_THK: Tensor, saved: Any, *, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the contiguous gradients of queries, keys and values."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensors:
    """One layer's weights, or the sums of their gradients; matrices with one input on top of each other."""

    attention_norm: Tensor
    mlp_norm: Tensor
    qkv: Tensor
    qk_norms: tuple[Tensor, Tensor] | None
    output: Tensor
    gate_up: Tensor
    down: Tensor
    adapters: LayerAdapters = NO_ADAPTERS


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderTensors:
    """A decoder's weights, or the sums of their gradients."""

    embedding: Tensor
    layers: tuple[LayerTensors, ...]
    final_norm: Tensor
    head: Tensor
    """The embedding itself where it is tied."""


@dataclass(kw_only=True, slots=True)
class _Kept:
    """Of one layer; None: computed again."""

    summed_1: Tensor
    normed_1: Tensor | None = None
    qkv: Tensor | None = None
    rotated: tuple[Tensor, Tensor] | None = None
    """Queries and keys."""
    attended: Tensor | None = None
    attention_state: Any = None
    summed_2: Tensor | None = None
    normed_2: Tensor | None = None
    gate_up: Tensor | None = None
    activated: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """A micro-batch on the device."""

    tokens: Tensor
    """[T]"""
    positions: Tensor
    """[T]"""
    scored: Tensor
    """[U] positions in T whose hidden states are asked for, in order."""
    attention: Attention


@dataclass(kw_only=True, slots=True)
class Forward:
    """The kept tensors of a forward, for `PackedDecoder.backward`, which uses them up."""

    sequences: Sequences
    layers: list[_Kept]
    summed: Tensor
    """[U, D], what the last norm saw."""


class PackedDecoder:
    """See the module docstring."""

    def __init__(self, architecture: Architecture, device: torch.device, *, invariant: bool) -> None:
        """Prepare for models of this architecture.

        Args:
            invariant: forward products have the same bits in every micro-batch.

        Raises:
            AssertionError: it has biases; see `supports`.
        """
        assert supports(architecture), "layers with biases are left to the Hugging Face module"
        self._eps = architecture.norm_eps
        self._heads = Heads(heads=architecture.num_heads, kv_heads=architecture.num_kv_heads, head_dim=architecture.head_dim)
        self._scale = architecture.head_dim**-0.5
        self._rope_of = (architecture.rope, architecture.max_positions)
        self._rope: Tensor | None = None
        self._forwards, self._backwards = kernels_on(device)
        self._product = linear if invariant else functional.linear

    @torch.no_grad()
    def forward(self, weights: DecoderTensors, sequences: Sequences, keep: Keep | None) -> tuple[Tensor, Forward | None]:
        """Return the normed hidden states [U, D] of the scored positions, and what `backward` needs unless `keep` is None."""
        layers: list[_Kept] = []
        x: Tensor = functional.embedding(sequences.tokens, weights.embedding)
        delta: Tensor | None = None
        for layer in weights.layers:
            x, delta, kept = self._layer(layer, x, delta, sequences, keep)
            if keep is not None:
                layers.append(kept)
        assert delta is not None, "a decoder has layers"
        x, delta = x.index_select(0, sequences.scored), delta.index_select(0, sequences.scored)
        summed, normed = self._forwards.add_rms_norm(x, delta, weights.final_norm, self._eps)
        return normed, None if keep is None else Forward(sequences=sequences, layers=layers, summed=summed)

    @torch.no_grad()
    def backward(self, weights: DecoderTensors, sums: DecoderTensors, forward: Forward, grad_hidden: Tensor) -> None:
        """Add the gradients of the weights to `sums`, from that of the hidden states [U, D]; the forward is used up."""
        sequences = forward.sequences
        scored = self._backwards.rms_norm_backward(
            forward.summed, weights.final_norm, grad_hidden.contiguous(), None, sums.final_norm, self._eps
        )
        grad = scored.new_zeros((len(sequences.tokens), scored.shape[1])).index_copy_(0, sequences.scored, scored)
        for layer, layer_sums in zip(reversed(weights.layers), reversed(sums.layers), strict=True):
            kept = forward.layers.pop()
            if kept.qkv is None:
                _, _, kept = self._layer(layer, kept.summed_1, None, sequences, Keep.ALL)
            grad = self._layer_backward(layer, layer_sums, kept, sequences, grad)
        if len(sums.embedding):
            # Sorted, not atomic: equal bits in every run.
            sums.embedding.index_put_((sequences.tokens,), grad.to(sums.embedding.dtype), accumulate=True)

    def _layer(
        self, weights: LayerTensors, x: Tensor, delta: Tensor | None, sequences: Sequences, keep: Keep | None
    ) -> tuple[Tensor, Tensor, _Kept]:
        """Return the residual, what is to be added to it, and what is kept."""
        summed_1, normed_1 = self._forwards.add_rms_norm(x, delta, weights.attention_norm, self._eps)
        adapters = weights.adapters
        qkv = self._multiply(normed_1, weights.qkv, adapters.qkv)
        q, k = self._rotated(qkv, weights, sequences)
        attended, state = sequences.attention.forward(q, k, self._heads.values(qkv), scale=self._scale)
        output = self._multiply(attended.flatten(1), weights.output, adapters.output)
        summed_2, normed_2 = self._forwards.add_rms_norm(summed_1, output, weights.mlp_norm, self._eps)
        gate_up = self._multiply(normed_2, weights.gate_up, adapters.gate_up)
        activated = self._forwards.silu_mul(*gate_up.chunk(2, dim=-1))
        kept = _Kept(summed_1=summed_1)
        if keep in (Keep.ALL, Keep.PRODUCTS):
            kept.qkv, kept.attended, kept.attention_state = qkv, attended, state
            kept.summed_2, kept.gate_up = summed_2, gate_up
        if keep is Keep.ALL:
            kept.normed_1, kept.rotated, kept.normed_2, kept.activated = normed_1, (q, k), normed_2, activated
        return summed_2, self._multiply(activated, weights.down, adapters.down), kept

    def _layer_backward(
        self, weights: LayerTensors, sums: LayerTensors, kept: _Kept, sequences: Sequences, grad: Tensor
    ) -> Tensor:
        """Return the gradient of the layer's input from that of its output, both of residual and what is added to it."""
        grad = self._mlp_backward(weights, sums, kept, grad)
        assert kept.qkv is not None and kept.attended is not None, "the attention's inputs are kept or computed again"
        adapters = weights.adapters
        grad_attended, slopes = _input_gradient(grad, weights.output, adapters.output)
        _add_gradients(sums.output, grad, kept.attended.flatten(1), adapters.output, sums.adapters.output, slopes)
        q, k = kept.rotated or self._rotated(kept.qkv, weights, sequences)
        grads = sequences.attention.backward(
            grad_attended.view_as(kept.attended),
            q,
            k,
            self._heads.values(kept.qkv),
            kept.attended,
            kept.attention_state,
            scale=self._scale,
        )
        norms = self._norms(weights, sums)
        grad_qkv = self._backwards.qk_norm_rope_backward(
            kept.qkv, self._heads, norms, self._rope_table(kept.qkv), sequences.positions, grads, self._eps
        )
        normed = kept.normed_1
        if normed is None:
            _, normed = self._forwards.add_rms_norm(kept.summed_1, None, weights.attention_norm, self._eps)
        grad_normed, slopes = _input_gradient(grad_qkv, weights.qkv, adapters.qkv)
        _add_gradients(sums.qkv, grad_qkv, normed, adapters.qkv, sums.adapters.qkv, slopes)
        result: Tensor = self._backwards.rms_norm_backward(
            kept.summed_1, weights.attention_norm, grad_normed, grad, sums.attention_norm, self._eps
        )
        return result

    def _mlp_backward(self, weights: LayerTensors, sums: LayerTensors, kept: _Kept, grad: Tensor) -> Tensor:
        """Return the gradient of the residual before the MLP."""
        assert kept.gate_up is not None and kept.summed_2 is not None, "the MLP's inputs are kept or computed again"
        adapters = weights.adapters
        grad_activated, slopes = _input_gradient(grad, weights.down, adapters.down)
        grad_gate_up, again = self._backwards.silu_mul_backward(kept.gate_up, grad_activated, recompute=kept.activated is None)
        activated = again if kept.activated is None else kept.activated
        _add_gradients(sums.down, grad, activated, adapters.down, sums.adapters.down, slopes)
        normed = kept.normed_2
        if normed is None:
            _, normed = self._forwards.add_rms_norm(kept.summed_2, None, weights.mlp_norm, self._eps)
        grad_normed, slopes = _input_gradient(grad_gate_up, weights.gate_up, adapters.gate_up)
        _add_gradients(sums.gate_up, grad_gate_up, normed, adapters.gate_up, sums.adapters.gate_up, slopes)
        result: Tensor = self._backwards.rms_norm_backward(
            kept.summed_2, weights.mlp_norm, grad_normed, grad, sums.mlp_norm, self._eps
        )
        return result

    def _multiply(self, x: Tensor, weight: Tensor, adapter: PackedAdapter | None) -> Tensor:
        """Return x [T, K] times a matrix [N, K], transposed, with its adapters."""
        y = self._product(x, weight)
        if adapter is not None:
            adapter.add(x, y)
        return y

    def _rotated(self, qkv: Tensor, weights: LayerTensors, sequences: Sequences) -> tuple[Tensor, Tensor]:
        norms = self._norms(weights, weights)  # a forward reads no sums
        q, k = self._backwards.qk_norm_rope(qkv, self._heads, norms, self._rope_table(qkv), sequences.positions, self._eps)
        return q, k

    def _norms(self, weights: LayerTensors, sums: LayerTensors) -> QkNorms | None:
        if weights.qk_norms is None:
            return None
        assert sums.qk_norms is not None, "weights and sums are of one architecture"
        (q_weight, k_weight), (q_sum, k_sum) = weights.qk_norms, sums.qk_norms
        return QkNorms(q_weight=q_weight, k_weight=k_weight, q_sum=q_sum, k_sum=k_sum)

    def _rope_table(self, like: Tensor) -> Tensor:
        if self._rope is None:
            self._rope = rope_table(*self._rope_of, like.device).to(like.dtype)
        return self._rope


def supports(architecture: Architecture) -> bool:
    """Tell whether this decoder has every part of the layers."""
    return not (architecture.qkv_bias or architecture.attention_output_bias or architecture.mlp_bias)


def _input_gradient(grad: Tensor, weight: Tensor, adapter: PackedAdapter | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of a product's input, and that of `x A^T` for `_add_gradients`."""
    grad_x = grad @ weight
    return grad_x, None if adapter is None else adapter.add_input_gradient(grad, grad_x)


def _add_gradients(
    total: Tensor, grad: Tensor, x: Tensor, adapter: PackedAdapter | None, sums: PackedAdapter | None, slopes: Tensor | None
) -> None:
    """Add the gradients of a matrix, unless it is frozen, and of its adapters."""
    if len(total):
        add_product(total, grad, x)
    if adapter is not None and sums is not None and slopes is not None:
        adapter.add_gradients(sums, grad, x, slopes)


def bind(tensors: Mapping[str, Tensor], architecture: Architecture) -> DecoderTensors:
    """Arrange tensors under their Hugging Face names; those that share an input lie back to back."""
    embedding = tensors["model.embed_tokens.weight"]
    return DecoderTensors(
        embedding=embedding,
        layers=tuple(_bind_layer(tensors, f"model.layers.{index}.") for index in range(architecture.num_layers)),
        final_norm=tensors["model.norm.weight"],
        head=embedding if architecture.tied_head else tensors["lm_head.weight"],
    )


def _bind_layer(tensors: Mapping[str, Tensor], prefix: str) -> LayerTensors:
    def stack(*names: str) -> Tensor:
        parts = [tensors[f"{prefix}{name}_proj.weight"] for name in names]
        ends = [part.data_ptr() + part.nbytes for part in parts]
        assert [part.data_ptr() for part in parts[1:]] == ends[:-1], f"{prefix}: {', '.join(names)} lie back to back"
        return parts[0].as_strided((sum(len(part) for part in parts), parts[0].shape[1]), parts[0].stride())

    q_norm, k_norm = f"{prefix}self_attn.q_norm.weight", f"{prefix}self_attn.k_norm.weight"
    return LayerTensors(
        attention_norm=tensors[prefix + "input_layernorm.weight"],
        mlp_norm=tensors[prefix + "post_attention_layernorm.weight"],
        qkv=stack("self_attn.q", "self_attn.k", "self_attn.v"),
        qk_norms=(tensors[q_norm], tensors[k_norm]) if q_norm in tensors else None,
        output=stack("self_attn.o"),
        gate_up=stack("mlp.gate", "mlp.up"),
        down=stack("mlp.down"),
    )


def kernels_on(device: torch.device) -> tuple[ModuleType, ModuleType]:
    """Return the element-wise forwards and backwards for a device."""
    if device.type != "cuda":
        return elementwise, gradients
    import qwench.models.decoder.elementwise_triton as forwards  # noqa: PLC0415 - Triton comes with GPU builds of PyTorch
    import qwench.models.decoder.gradients_triton as backwards  # noqa: PLC0415 - likewise

    return forwards, backwards
