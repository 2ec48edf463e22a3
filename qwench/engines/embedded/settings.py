"""How large the embedded engine is and how it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedSettings:
    """Sizes and modes; every default suits a small model on a CPU or one GPU."""

    page_size: int = 16
    """Tokens of one KV page."""
    max_running_requests: int = 512
    prefill_chunk_tokens: int = 4096
    """Prompt tokens computed in one forward pass; longer prompts are cut into chunks."""
    kv_cache_tokens: int | None = None
    """Capacity of the KV pool. None: what `mem_fraction` leaves on a GPU, 65,536 on a CPU."""
    mem_fraction: float = 0.8
    """Share of the GPU's whole memory that all processes together may use once the pool is made."""
    dtype: torch.dtype | None = None
    """None: bfloat16 on a GPU, float32 on a CPU."""
    fp8: bool = False
    """Hold the matrices of the layers in block-wise FP8 (`models.fp8`); weights must then come in that form."""
    device: str = "cpu"
    inline: bool = False
    """Run steps on the event loop itself and wait for it to be quiet first: batches, and so all results, are reproducible."""
    batch_invariant: bool = False
    """Compute a token with the same bits in every batch; on a CPU."""
    seed: int = 0
    """Source of the seeds of requests that bring none."""
    prefix_cache: bool = True
    """Keep the KV pages of finished requests for later prompts that begin alike."""
    cuda_graphs: bool = True
    """Capture decode steps as CUDA graphs (no effect on a CPU)."""

    overlap: bool | None = None
    """Launch a step before the tokens of the one before it are known. None: on a GPU, where the host is hidden by it."""

    @property
    def resolved_overlap(self) -> bool:
        """Tell whether a step is in flight while the next one is planned."""
        return self.overlap if self.overlap is not None else torch.device(self.device).type == "cuda"

    @property
    def resolved_dtype(self) -> torch.dtype:
        """Return the dtype of weights and KV cache."""
        if self.dtype is not None:
            return self.dtype
        return torch.float32 if torch.device(self.device).type == "cpu" else torch.bfloat16
