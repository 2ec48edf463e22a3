"""Qwen3 checkpoints with random weights: tiny ones to learn with, the sizes that Qwen published to measure with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from qwench.errors import ConfigError
from qwench.files import TEMPORARY_SUFFIX, check_can_hold, is_occupied, rename_durably
from qwench.models.built_tokenizers import END_OF_TEXT, END_OF_TURN
from qwench.models.shards import write_shards

_VOCAB_MULTIPLE = 64
"""Embedding rows are padded so that tensor parallelism and matrix kernels get even shapes."""
QWEN3_VOCAB_SIZE = 151_936
"""Rows of the embedding: Qwen3's 151,669 tokens and padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """The shape of a dense Qwen3."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    tied: bool = True
    rope_theta: float = 1e6
    max_position_embeddings: int = 40_960
    vocab_size: int | None = QWEN3_VOCAB_SIZE
    """None: as many as the tokenizer needs."""
    initial_std: float = 0.02
    """Of random weights; about 1 / sqrt(hidden size) where the model is trained from them."""

    def to_config(self, *, vocab_size: int) -> Qwen3Config:
        """Return the transformers configuration of this shape."""
        return Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=1e-6,
            architectures=["Qwen3ForCausalLM"],
        )


SIZES: MappingProxyType[str, ModelSize] = MappingProxyType({
    # Made on the spot, with the vocabulary of their tokenizer: about 1.0M, 31M and 63M parameters besides the embedding.
    "tiny": ModelSize(hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
                      max_position_embeddings=4096, vocab_size=None, initial_std=0.08),
    "30M": ModelSize(hidden_size=512, intermediate_size=1536, num_layers=10, num_heads=8, num_kv_heads=4, head_dim=64,
                     max_position_embeddings=8192, vocab_size=None, initial_std=0.04),
    "60M": ModelSize(hidden_size=768, intermediate_size=2048, num_layers=10, num_heads=12, num_kv_heads=4, head_dim=64,
                     max_position_embeddings=8192, vocab_size=None, initial_std=0.036),
    # Published by Qwen.
    "0.6B": ModelSize(hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8),
    "1.7B": ModelSize(hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16, num_kv_heads=8),
    "4B": ModelSize(hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, num_kv_heads=8),
    "4B-Instruct-2507": ModelSize(hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, num_kv_heads=8,
                                  rope_theta=5e6, max_position_embeddings=262_144),
    "8B": ModelSize(hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, num_kv_heads=8, tied=False),
    "14B": ModelSize(hidden_size=5120, intermediate_size=17408, num_layers=40, num_heads=40, num_kv_heads=8, tied=False),
    "32B": ModelSize(hidden_size=5120, intermediate_size=25600, num_layers=64, num_heads=64, num_kv_heads=8, tied=False),
})  # fmt: skip


def find_size(name: str) -> ModelSize:
    """Return the size called `name`."""
    if name not in SIZES:
        raise ConfigError(f"unknown --size {name!r}; known: {', '.join(SIZES)}.")
    return SIZES[name]


def make_checkpoint(
    folder: Path,
    *,
    size: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Qwen3Config:
    """Write a Hugging Face folder with random bfloat16 weights of the named size, and return its configuration.

    The folder appears whole or not at all. Equal arguments give equal bytes (on one kind of device). Tensors are made and
    written one by one.

    Raises:
        ConfigError: unknown size, tokenizer larger than the size's vocabulary, or a folder that is not empty.
    """
    shape = find_size(size)
    vocab_size = shape.vocab_size or -(-len(tokenizer) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if len(tokenizer) > vocab_size:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, but --size {size} has a vocabulary of {vocab_size}.")
    if is_occupied(folder):
        raise ConfigError(f"--output {folder} exists and is not an empty folder; choose another.")
    config = shape.to_config(vocab_size=vocab_size)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        nbytes = sum(one.numel() * config.dtype.itemsize for one in Qwen3ForCausalLM(config).parameters())
    check_can_hold(folder, flag="--output", nbytes=nbytes)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    partial = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    partial.mkdir(parents=True)
    tokenizer.save_pretrained(partial)
    _generation_config(tokenizer).save_pretrained(partial)
    weights = random_weights(config, seed=seed, dtype=config.dtype, device=device, std=shape.initial_std)
    write_shards(partial, ([entry] for entry in weights))
    config.save_pretrained(partial)
    _add_rope_theta(partial / "config.json", shape.rope_theta)
    rename_durably(partial, folder)
    return config


def random_weights(
    config: Qwen3Config, *, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu", std: float = 0.02
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of the model: norms are 1, everything else normal with standard deviation `std`."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    generator = torch.Generator(device=device)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("norm.weight"):
            yield name, torch.ones(parameter.shape, dtype=dtype, device=device)
        else:
            generator.manual_seed((seed << 20) + index)
            values = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            yield name, values.normal_(0.0, std, generator=generator).to(dtype)


def _generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    stop_ids = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    return GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)


def _add_rope_theta(config_file: Path, theta: float) -> None:
    """Repeat the rotary base where readers older than transformers 5 look for it."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**config, "rope_theta": theta}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
