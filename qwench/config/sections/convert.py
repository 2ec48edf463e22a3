"""Settings of `qwench convert`, and the argument lists of slime's two converters, which mean the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_positive
from qwench.config.sections.architecture import ArchitectureConfig
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """What `qwench convert` reads and writes. Run it under torchrun to let several processes write."""

    input: Path
    """Checkpoint to read: a Hugging Face folder, or one of torch_dist or FSDP; for the latter two also the folder above it."""
    output: Path
    """Folder to write, which must not hold anything yet."""
    to: Literal["hf", "torch_dist", "fsdp", "fp8"]
    """Format to write: hf (safetensors), torch_dist (Megatron), fsdp (float32 masters of --train-backend fsdp) or fp8 (hf
    with the layers' matrices in FP8, in blocks of 128 x 128 with float32 scales)."""
    hf_checkpoint: Path | None = None
    """Hugging Face folder with config.json and tokenizer of the model. None: --input, which is one."""
    ckpt_step: int | None = None
    """Iteration to read from the folder above it. None: the latest."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the weights to write. None: as they are stored; of an FSDP checkpoint's float32 masters, what config.json says."""
    weights_only: bool = False
    """Leave the optimizer's state out where there is some."""
    verify: bool = False
    """Also compare the logits of three prompts, of a model with the weights that were read and with those written."""
    max_shard_gb: float = 2.0
    """Size of one safetensors file."""

    def __post_init__(self) -> None:
        check_positive("--max-shard-gb", self.max_shard_gb)
        if self.verify and self.to == "fp8":
            raise ConfigError(
                "--verify compares logits bit by bit, and FP8 weights are other numbers; leave it out with --to fp8"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HfToTorchDistFiles:
    """Folders of `tools/convert_hf_to_torch_dist.py`."""

    hf_checkpoint: Path
    """Hugging Face folder to read."""
    save: Path
    """Folder to write, which must not hold anything yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IgnoredParallelism:
    """Layouts that the recipes give; a torch_dist checkpoint is the same for all of them."""

    tensor_model_parallel_size: int = 1
    """Without effect: any layout reads what is written."""
    pipeline_model_parallel_size: int | None = None
    """Without effect: processes under torchrun share the layers out between them."""
    context_parallel_size: int = 1
    """Without effect."""
    expert_model_parallel_size: int = 1
    """Without effect."""
    expert_tensor_parallel_size: int = 1
    """Without effect."""
    decoder_first_pipeline_num_layers: int | None = None
    """Without effect."""
    decoder_last_pipeline_num_layers: int | None = None
    """Without effect."""
    make_vocab_size_divisible_by: int = 128
    """Without effect: the vocabulary is written without padding, and padded where it is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfToTorchDistConfig:
    """What `tools/convert_hf_to_torch_dist.py` takes: MODEL_ARGS, which are compared with config.json, and two folders."""

    files: HfToTorchDistFiles
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    parallelism: IgnoredParallelism = field(default_factory=IgnoredParallelism)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchDistToHfConfig:
    """What `tools/convert_torch_dist_to_hf.py` takes."""

    input_dir: Path
    """Folder of a torch_dist checkpoint, or the one above it."""
    output_dir: Path
    """Folder to write, which must not hold anything yet unless --force is given."""
    origin_hf_dir: Path
    """Hugging Face folder with config.json and tokenizer of the model."""
    force: bool = False
    """Replace --output-dir."""
    chunk_size: int = 2 * 10**9
    """Size of one safetensors file in bytes."""
    vocab_size: int | None = None
    """Compared with config.json, which says how many rows of a padded vocabulary are kept."""
    model_name: str | None = None
    """Without effect: config.json says what the model is."""
