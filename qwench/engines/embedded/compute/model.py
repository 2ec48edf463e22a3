"""The forward pass of a dense decoder over packed tokens and a paged cache, straight from named weights.

Which parts exist (QK norm, biases, own head) is decided once, by which weights the architecture has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from qwench.algorithms.log_probs import head_logits
from qwench.engines.embedded.compute.adapters import AdaptedProjection, AdapterStore
from qwench.engines.embedded.compute.attention import Attention
from qwench.engines.embedded.compute.kv_memory import KVCache
from qwench.engines.embedded.compute.ranks import RankGroup
from qwench.engines.embedded.scheduling.scoring import score_rows
from qwench.engines.protocol import Scoring
from qwench.models.architecture import Architecture
from qwench.models.decoder import elementwise
from qwench.models.decoder import invariant as tiled
from qwench.models.decoder.invariant import TILE, padded
from qwench.models.decoder.linear import Product, Projection
from qwench.models.decoder.native import elementwise as native_elementwise
from qwench.models.decoder.native import products as native_products
from qwench.models.decoder.products import linear
from qwench.models.decoder.rope import rope_table

SCORED_AT_ONCE = 512
"""Tokens whose logits are held at a time: 300 MiB with Qwen3's vocabulary."""
Hidden = tuple[Tensor, Tensor | None]
"""Of the packed tokens [T, D], before the final norm: the residual stream, and the last layer's output to add to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """The weights of one layer."""

    attention_norm: Tensor
    mlp_norm: Tensor
    qkv: AdaptedProjection
    qk_norms: tuple[Tensor, Tensor] | None
    output: AdaptedProjection
    gate_up: AdaptedProjection
    down: AdaptedProjection


class DecoderModel:
    """A forward pass over weights that the weight store owns."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, Tensor],
        device: torch.device,
        *,
        adapters: AdapterStore,
        invariant: bool,
        native: bool,
        ranks: RankGroup | None,
    ) -> None:
        """Bind to `weights` by Hugging Face name, and to the adapters; their storage is used, not copied.

        Args:
            invariant: a token has the same bits in every batch.
            native: compute with the C++ kernels.
            ranks: hold the other parts of the weights. None: these are all.
        """
        self._invariant = invariant
        self._ops, self._product = _kernels_of(device, native=native, invariant=invariant)
        self._ranks = ranks
        self._architecture = architecture
        self.parameters = list(weights.values())
        self._embedding = weights["model.embed_tokens.weight"]
        self._final_norm = weights["model.norm.weight"]
        self._head = self._embedding if architecture.tied_head else weights["lm_head.weight"]
        self._layers = [
            _bind_layer(weights, adapters, f"model.layers.{index}.", self._product) for index in range(architecture.num_layers)
        ]
        self._rope = rope_table(architecture.rope, architecture.max_positions, device).to(self._embedding.dtype)

    @property
    def query_shape(self) -> tuple[int, int]:
        """Return the heads of this rank and their size."""
        return self._architecture.num_heads, self._architecture.head_dim

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv_cache: KVCache,
        attention: Attention,
        mix: Tensor | None,
    ) -> Hidden:
        """Store keys and values of the packed tokens and return their hidden states.

        Args:
            mix: the tokens' adapters (see `compute.adapters`). None: they have none.
        """
        hidden: Hidden = self.embed(token_ids), None
        for index, (keys, values) in enumerate(kv_cache.layers):
            x_TD, q_THK = self.before_attention(index, hidden, positions, slots, keys, values, mix)
            hidden = self.after_attention(index, x_TD, attention(q_THK, keys, values), mix)
        return self.end(hidden)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings [T, D] of tokens."""
        if self._ranks is not None:
            return self._ranks.embed(token_ids, self._embedding)
        return functional.embedding(token_ids, self._embedding)

    def before_attention(
        self,
        index: int,
        hidden: Hidden,
        positions: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        mix: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Begin layer `index`: store its keys and values, and return the residual stream [T, D] and the queries [T, H, K]."""
        layer, eps = self._layers[index], self._architecture.norm_eps
        x_TD, normed = self._add_norm(*hidden, layer.attention_norm, buffer=1)
        qkv = layer.qkv(normed, mix)
        return x_TD, self._ops.qk_norm_rope_store(qkv, layer.qk_norms, self._rope, positions, slots, keys, values, eps)

    def after_attention(self, index: int, x_TD: Tensor, attended_THK: Tensor, mix: Tensor | None) -> tuple[Tensor, Tensor]:
        """End layer `index`: return the residual stream and what to add to it, of which each rank has a part until `end`."""
        layer = self._layers[index]
        (delta_TD,) = layer.output(attended_THK.flatten(1), mix)
        x_TD, normed = self._add_norm(x_TD, delta_TD, layer.mlp_norm, buffer=0)
        (delta_TD,) = layer.down(self._ops.silu_mul(*layer.gate_up(normed, mix)), mix)
        return x_TD, delta_TD

    def end(self, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Return the hidden states for the result of the last layer."""
        x_TD, delta_TD = hidden
        assert delta_TD is not None, "a model has layers"
        return x_TD, delta_TD if self._ranks is None else self._ranks.add_up(delta_TD)

    def logits(self, hidden: Hidden, tokens: Tensor | None = None) -> Tensor:
        """Return the logits [U, V] float32 of some of the packed tokens, or of all."""
        x_TD, delta_TD = hidden
        if tokens is not None:
            x_TD, delta_TD = x_TD[tokens], None if delta_TD is None else delta_TD[tokens]
        _, normed = self._ops.add_rms_norm(x_TD, delta_TD, self._final_norm, self._architecture.norm_eps)
        if not self._invariant:
            logits = head_logits(normed, self._head, product=self._product)
            return logits if self._ranks is None else self._ranks.gather_columns(logits)
        return torch.cat([head_logits(tile, self._head) for tile in padded(normed).split(TILE)])[: len(normed)]

    def scores(self, hidden: Hidden, tokens: Tensor, labels: Tensor, scoring: Scoring) -> Tensor:
        """Return what `scoring` wants of the packed tokens, a few at a time: their logits may not fit into memory at once."""
        pairs = torch.stack((tokens, labels)).split(SCORED_AT_ONCE, dim=1)
        return torch.cat([score_rows(self.logits(hidden, some).log_softmax(-1), after, scoring) for some, after in pairs])

    def _add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, *, buffer: int) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm, of a delta of which each rank has a part; `buffer` see `PeerSums`."""
        eps = self._architecture.norm_eps
        if delta_TD is not None and self._ranks is not None:
            peers = self._ranks.peers
            if peers is not None and peers.can_sum(delta_TD):
                return peers.add_rms_norm(x_TD, delta_TD, weight_D, eps, buffer=buffer)
            delta_TD = self._ranks.add_up(delta_TD)
        added: tuple[Tensor, Tensor] = self._ops.add_rms_norm(x_TD, delta_TD, weight_D, eps)
        return added


def _kernels_of(device: torch.device, *, native: bool, invariant: bool) -> tuple[ModuleType, Product]:
    """Return the element-wise operations, and the product with plain matrices."""
    product = tiled.linear if invariant else linear
    if device.type == "cuda":
        import qwench.models.decoder.elementwise_triton as kernels  # noqa: PLC0415  # Triton comes with CUDA only

        return kernels, product
    return (native_elementwise, native_products.linear) if native else (elementwise, product)


def _bind_layer(weights: Mapping[str, Tensor], adapters: AdapterStore, prefix: str, product: Product) -> _Layer:
    def project(*names: str) -> AdaptedProjection:
        base = Projection.bind(weights, prefix, *names, product=product)
        return AdaptedProjection(base, adapters.stack([prefix + name for name in names]))

    q_norm, k_norm = (weights.get(f"{prefix}self_attn.{name}.weight") for name in ("q_norm", "k_norm"))
    return _Layer(
        attention_norm=weights[prefix + "input_layernorm.weight"],
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
        qkv=project("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        qk_norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
        output=project("self_attn.o_proj"),
        gate_up=project("mlp.gate_proj", "mlp.up_proj"),
        down=project("mlp.down_proj"),
    )
