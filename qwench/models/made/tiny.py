"""Qwen3 checkpoints with random weights, made on the spot: tiny ones to learn with, real sizes to measure with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from qwench.errors import ConfigError
from qwench.files import TEMPORARY_SUFFIX, check_can_hold, is_occupied, rename_durably
from qwench.models.made.tokenizers import END_OF_TEXT, END_OF_TURN
from qwench.models.registry import find_size
from qwench.models.shards import write_shards

_VOCAB_MULTIPLE = 64
"""Embedding rows are padded so that tensor parallelism and matrix kernels get even shapes."""


def make_checkpoint(
    folder: Path,
    *,
    size: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Qwen3Config:
    """Write a Hugging Face folder with random weights of the named size, and return its configuration.

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
    check_can_hold(folder, flag="--output")
    config = shape.to_config(vocab_size=vocab_size)
    config.dtype = dtype
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    partial = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    partial.mkdir(parents=True)
    tokenizer.save_pretrained(partial)
    _generation_config(tokenizer).save_pretrained(partial)
    weights = random_weights(config, seed=seed, dtype=dtype, device=device, std=shape.initial_std)
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
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "rope_theta": theta}, indent=2, sort_keys=True) + "\n")
