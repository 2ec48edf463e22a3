"""How much of a forward is kept for its backward, given the free memory. Trained numbers do not depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwench.models.architecture import Architecture
from qwench.training.packed_decoder import Keep

_MARGIN_BYTES = 2 << 30
"""For temporaries of a layer's backward, workspaces, and pieces of free memory that are too small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationBudget:
    """Chooses what to keep. First comes what saves most time for its bytes: outputs of products, then logits, then the rest."""

    architecture: Architecture
    param_dtype: torch.dtype
    head_chunk_tokens: int
    recomputes: bool
    """Layers keep nothing, however much memory is free."""
    logit_bytes: int = 4
    """See `algorithms.log_probs.logit_bytes`."""

    def choose(self, num_tokens: int, num_scored: int, *, free: int | None, has_support: bool = False) -> tuple[Keep, int]:
        """Return what layers keep, and how many bytes of logits may be kept, in a micro-batch of this size.

        Args:
            free: Bytes of the GPU. None: a CPU, where logits are not kept.
            has_support: Logits are cut off where sampling kept no token, so they are float32.
        """
        if free is None:
            return (Keep.NOTHING if self.recomputes else Keep.ALL), 0
        room = free - _MARGIN_BYTES
        needed = {keep: kept_bytes(self.architecture, num_tokens, keep, self.param_dtype) for keep in Keep}
        position = (4 if has_support else self.logit_bytes) * self.architecture.vocab_size
        logits = num_scored * position
        if not self.recomputes and needed[Keep.ALL] + logits <= room:
            return Keep.ALL, logits
        room -= min(num_scored, self.head_chunk_tokens) * position
        if self.recomputes or needed[Keep.PRODUCTS] > room:
            return Keep.NOTHING, max(0, room - needed[Keep.NOTHING])
        return Keep.PRODUCTS, max(0, room - needed[Keep.PRODUCTS])

    def predict(self, num_tokens: int, num_scored: int, *, free: int | None) -> int:
        """Return the bytes of activations and logits that `choose` leads to."""
        keep, logits = self.choose(num_tokens, num_scored, free=free)
        layers = kept_bytes(self.architecture, num_tokens, keep, self.param_dtype)
        position = self.logit_bytes * self.architecture.vocab_size
        return layers + min(num_scored * position, logits + min(num_scored, self.head_chunk_tokens) * position)


def kept_bytes(architecture: Architecture, num_tokens: int, keep: Keep, dtype: torch.dtype) -> int:
    """Return the bytes that the layers of one forward keep for its backward."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    q_size, kv_size = architecture.num_heads * architecture.head_dim, architecture.num_kv_heads * architecture.head_dim
    elements, float32 = hidden, 0
    if keep is not Keep.NOTHING:
        elements += (q_size + 2 * kv_size) + q_size + hidden + 2 * ffn
        float32 += architecture.num_heads  # log-sum-exps of the attention, not counting what they are padded by
    if keep is Keep.ALL:
        elements += 2 * hidden + q_size + kv_size + ffn
    return architecture.num_layers * num_tokens * (elements * dtype.itemsize + float32 * 4)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
