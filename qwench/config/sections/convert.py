"""Settings of `qwench convert`, and the argument lists of slime's two converters, which mean the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_positive
from qwench.config.sections.model import ArchitectureConfig
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Input and output of `qwench convert`. Under torchrun several processes write."""

    input: Path
    """Checkpoint to read: a folder of Hugging Face, torch_dist or FSDP format, or of a LoRA adapter (PEFT), which is merged
    into --hf-checkpoint. The parent folder of a run works too."""
    output: Path
    """Folder to write. Must be new or empty."""
    to: Literal["hf", "torch_dist", "fsdp", "fp8", "lora"]
    """Output format. hf: safetensors. torch_dist: Megatron. fsdp: float32 masters of --train-backend fsdp. fp8: hf with layer
    matrices in FP8, in 128 x 128 blocks with float32 scales. lora: the change from --hf-checkpoint to --input, as a
    PEFT adapter."""
    hf_checkpoint: Path | None = None
    """Hugging Face folder with config.json and tokenizer of the model; of an adapter, its base model. None: --input."""
    ckpt_step: int | None = None
    """Iteration to read from the parent folder. None: the latest."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the weights to write. None: as stored; for float32 masters of FSDP, the dtype in config.json."""
    weights_only: bool = False
    """Do not convert the optimizer state."""
    lora_rank: int | None = None
    """Rank of the adapter of --to lora, which requires it. An adapter in --input gets this rank."""
    verify: bool = False
    """Compare the logits of three prompts before and after the conversion."""
    max_shard_gb: float = 2.0
    """Largest size of one safetensors file, in GB."""

    def __post_init__(self) -> None:
        check_positive("--max-shard-gb", self.max_shard_gb)
        check_positive("--lora-rank", self.lora_rank)
        if (self.to == "lora") != (self.lora_rank is not None):
            raise ConfigError("--to lora and --lora-rank go together: the rank is that of the adapter to write")
        if self.verify and self.to in ("fp8", "lora"):
            raise ConfigError(f"--verify compares logits bit by bit, and those of --to {self.to} are others; leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class HfToTorchDistFiles:
    """Folders of `tools/convert_hf_to_torch_dist.py`."""

    hf_checkpoint: Path
    """Hugging Face folder to read."""
    save: Path
    """Folder to write. Must be new or empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IgnoredParallelism:
    """Layouts that the recipes give; a torch_dist checkpoint is the same for all of them."""

    tensor_model_parallel_size: int = 1
    """No effect: every layout can read the output."""
    pipeline_model_parallel_size: int | None = None
    """No effect: processes under torchrun divide the layers among them."""
    context_parallel_size: int = 1
    """No effect."""
    expert_model_parallel_size: int = 1
    """No effect."""
    expert_tensor_parallel_size: int = 1
    """No effect."""
    decoder_first_pipeline_num_layers: int | None = None
    """No effect."""
    decoder_last_pipeline_num_layers: int | None = None
    """No effect."""
    make_vocab_size_divisible_by: int = 128
    """No effect: the vocabulary is written without padding, and padded when it is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfToTorchDistConfig:
    """Flags of `tools/convert_hf_to_torch_dist.py`: MODEL_ARGS, which are compared with config.json, and two folders."""

    files: HfToTorchDistFiles
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    parallelism: IgnoredParallelism = field(default_factory=IgnoredParallelism)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchDistToHfConfig:
    """Flags of `tools/convert_torch_dist_to_hf.py`."""

    input_dir: Path
    """Folder of a torch_dist checkpoint, or its parent folder."""
    output_dir: Path
    """Folder to write. Must be new or empty unless --force is given."""
    origin_hf_dir: Path
    """Hugging Face folder with config.json and tokenizer of the model."""
    force: bool = False
    """Replace --output-dir if it exists."""
    chunk_size: int = 2 * 10**9
    """Largest size of one safetensors file, in bytes."""
    vocab_size: int | None = None
    """Size of the vocabulary without padding. Must equal config.json."""
    model_name: str | None = None
    """No effect: config.json describes the model."""
