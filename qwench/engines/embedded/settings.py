"""Where and how the embedded engine runs, besides the sizes that flags say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from qwench.config.sections.engine import EngineConfig
from qwench.models.decoder.native.library import DTYPES, library


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedSettings:
    """Sizes, device and modes. The defaults suit a small model on a CPU."""

    sizes: EngineConfig = field(default_factory=EngineConfig)
    """The --embedded-* flags."""
    dtype: torch.dtype | None = None
    """None: bfloat16 on a GPU, float32 on a CPU."""
    fp8: bool = False
    """Hold the matrices of the layers in block-wise FP8 (`models.fp8`); weights must then come in that form."""
    device: str = "cpu"
    """That of rank 0."""
    num_devices: int = 1
    """GPUs, or processes on a CPU, that the model is divided over (see `compute.ranks`)."""
    inline: bool = False
    """Run steps on the event loop, and only when no request came for some turns. Batches, and so results, are reproducible."""
    batch_invariant: bool = False
    """Compute a token with the same bits in every batch; on a CPU."""
    seed: int = 0
    """Source of the seeds of requests that bring none."""
    prefix_cache: bool = True
    """Keep the KV pages of finished requests for later prompts with the same beginning."""
    cuda_graphs: bool = True
    """Capture decode steps as CUDA graphs (no effect on a CPU)."""
    overlap: bool | None = None
    """Launch a step before the tokens of the previous step are known. None: on a GPU, where this hides the host's work."""

    @property
    def resolved_overlap(self) -> bool:
        """Tell whether a step is in flight while the next one is planned."""
        return self.overlap if self.overlap is not None else torch.device(self.device).type == "cuda"

    @property
    def resolved_native(self) -> bool:
        """Tell whether the C++ kernels compute; the first call of a process may compile them."""
        suits = torch.device(self.device).type == "cpu" and not self.batch_invariant and self.resolved_dtype in DTYPES
        return suits and self.sizes.embedded_native_kernels and library() is not None

    def of_ranks(self) -> EmbeddedSettings:
        """Return the settings of all ranks: where rank 0 lacks the C++ kernels, each would draw other tokens with its own."""
        return replace(self, sizes=replace(self.sizes, embedded_native_kernels=self.resolved_native))

    @property
    def resolved_dtype(self) -> torch.dtype:
        """Return the dtype of weights and KV cache."""
        if self.dtype is not None:
            return self.dtype
        return torch.float32 if torch.device(self.device).type == "cpu" else torch.bfloat16
