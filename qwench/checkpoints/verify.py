"""Whether two checkpoints of a model compute the same logits, in Hugging Face's own model.

Where one of the two is a Hugging Face folder, transformers loads it by itself; only the other is read by `sources`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwench.checkpoints.formats.sources import find_format, open_weights
from qwench.models.hf import architecture_of, load_hf_config, load_model, load_tokenizer, model_of

PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "Question: What is 12 + 30?\nAnswer:")


@torch.no_grad()
def largest_logit_difference(folder: Path, other: Path, *, hf_folder: Path, dtype: torch.dtype) -> float:
    """Return the largest difference of a logit over `PROMPTS`; infinite where one is not a number.

    Both checkpoints go into one model, one after the other, so memory is that of one model in `dtype`.

    Args:
        hf_folder: Has config.json and tokenizer.
    """
    if find_format(folder) != "hf" and find_format(other) == "hf":
        folder, other = other, folder
    tokenizer = load_tokenizer(hf_folder)
    model = _load(folder, hf_folder=hf_folder, dtype=dtype)
    first = _logits(model, tokenizer)
    _fill(model, other, hf_folder=hf_folder)
    differences = [(a.float() - b.float()).abs().max() for a, b in zip(first, _logits(model, tokenizer), strict=True)]
    return float(torch.stack(differences).nan_to_num(nan=float("inf")).max())


def _load(folder: Path, *, hf_folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    if find_format(folder) == "hf":
        return load_model(folder, dtype=dtype)
    config = load_hf_config(hf_folder)
    source = open_weights(folder, architecture_of(config))
    return model_of(config, {name: source.read(name) for name in source.specs}, dtype=dtype)


def _fill(model: nn.Module, folder: Path, *, hf_folder: Path) -> None:
    source = open_weights(folder, architecture_of(load_hf_config(hf_folder)))
    for name, parameter in model.named_parameters():
        parameter.copy_(source.read(name))


def _logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    return [model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits for prompt in PROMPTS]
