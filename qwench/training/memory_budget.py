"""How much of a forward is kept for its backward, given the free memory. Trained numbers do not depend on it."""

from __future__ import annotations

import torch

from qwench.models.architecture import Architecture
from qwench.training.packed_decoder import Keep

_MARGIN_BYTES = 2 << 30
"""For temporaries of a layer's backward, workspaces, and pieces of free memory that are too small."""


class ActivationBudget:
    """Chooses what to keep. First comes what saves most time for its bytes: outputs of products, then logits, then the rest."""

    def __init__(
        self, architecture: Architecture, device: torch.device, param_dtype: torch.dtype, *, head_chunk_tokens: int
    ) -> None:
        self._architecture = architecture
        self._device = device
        self._param_dtype = param_dtype
        self._head_chunk_tokens = head_chunk_tokens

    def choose(self, num_tokens: int, num_scored: int, *, recomputes: bool) -> tuple[Keep, int]:
        """Return what layers keep, and how many bytes of logits may be kept, in a micro-batch of this size.

        Args:
            recomputes: Layers keep nothing, however much memory is free.
        """
        logits = 4 * num_scored * self._architecture.vocab_size
        if self._device.type != "cuda":
            return (Keep.NOTHING if recomputes else Keep.ALL), 0
        room = free_bytes(self._device) - _MARGIN_BYTES
        needed = {keep: kept_bytes(self._architecture, num_tokens, keep, self._param_dtype) for keep in Keep}
        # Logits that are not kept take the memory of one chunk while they are used.
        chunk = 4 * min(num_scored, self._head_chunk_tokens) * self._architecture.vocab_size
        if not recomputes and needed[Keep.ALL] + logits <= room:
            return Keep.ALL, logits
        room -= chunk
        if recomputes or needed[Keep.PRODUCTS] > room:
            return Keep.NOTHING, max(0, room - needed[Keep.NOTHING])
        return Keep.PRODUCTS, max(0, room - needed[Keep.PRODUCTS])


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


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
