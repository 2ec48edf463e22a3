"""What `qwench convert` writes, megatron-core reads, and the other way round; in every layout, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwench.checkpoints.convert import Conversion, Converter, Ranks
from qwench.checkpoints.formats.sources import Format
from qwench.models.hf import load_hf_config
from tests.contract import convert_ranks

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}


def write_models(folder: Path) -> None:
    """Save random models; no two values that a mix-up could hide are equal, and one vocabulary is odd."""
    torch.manual_seed(3)
    models = {
        "tied": Qwen3ForCausalLM(Qwen3Config(vocab_size=48, head_dim=8, tie_word_embeddings=True, **_SIZES)),
        "untied": Qwen3ForCausalLM(Qwen3Config(vocab_size=48, head_dim=8, tie_word_embeddings=False, **_SIZES)),
        "biased": Qwen2ForCausalLM(Qwen2Config(vocab_size=49, tie_word_embeddings=False, **_SIZES)),
    }
    for name, model in models.items():
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_()
        model.to(torch.bfloat16).save_pretrained(folder / name)


def convert(folder: Path, source: str, output: str, to: Format, hf: str) -> None:
    conversion = Conversion(
        source=folder / source, output=folder / output, to=to, hf_folder=folder / hf, config=load_hf_config(folder / hf)
    )
    Converter(conversion).run(Ranks(), lambda nbytes: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert all models, and let megatron-core load and save them in every layout once."""
    folder = tmp_path_factory.mktemp("convert")
    write_models(folder)
    for model in convert_ranks.MODELS:
        convert(folder, model, f"{model}-converted", "torch_dist", model)
    convert_ranks.load_and_save(folder)  # fails where a parameter that megatron-core loaded is not Hugging Face's
    return folder


@pytest.mark.parametrize(("model", "layout"), convert_ranks.SAVES, ids=str)
def test_what_megatron_saves_converts_back_byte_by_byte(folder: Path, model: str, layout: tuple[int, int]) -> None:
    saved = convert_ranks.saved_as(model, layout)
    convert(folder, saved, f"{saved}-hf", "hf", model)
    back, original = (load_file(folder / name / "model.safetensors") for name in (f"{saved}-hf", model))
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
