"""The model, its precision and its attention kernel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

AttnImplementation = Literal["sdpa", "flash_attention_2", "flash_attention_3", "varlen", "cudnn"]
TrainDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model and its numerics."""

    hf_checkpoint: Path | None = None
    """Hugging Face checkpoint with config.json and tokenizer: a folder, or OWNER/NAME of the Hugging Face hub. A fresh run
    starts from its weights. Required."""
    attn_implementation: AttnImplementation = "sdpa"
    """Attention kernel of the FSDP2 trainer. sdpa runs everywhere; the others need a GPU, and flash_attention_*
    and cudnn their package. cudnn, the fastest on one GPU, is varlen on several."""
    train_dtype: TrainDtype = "auto"
    """Precision of parameters and activations, in the trainer and in embedded engines. Optimizer masters are always float32.
    auto: bfloat16 on a GPU, float32 on a CPU."""
