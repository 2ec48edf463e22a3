"""Which entries lie beside the tensors of a torch_dist folder, and how layers that are stored one by one are read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from qwench.checkpoints.formats.sources import open_weights
from qwench.checkpoints.formats.torch_dist import TorchDistWeights, extra_states, write_common_files
from qwench.errors import ConfigError
from qwench.models.megatron_names import rules, to_megatron
from tests.unit.checkpoints.formats.test_sources import MODEL, assert_gives
from tests.unit.config.architectures import QWEN3_4B

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write_layers_apart(folder: Path, *, num_layers: int) -> dict[str, Tensor]:
    """Write each layer under a key of its own, and return the weights of all layers under Hugging Face names."""
    model = replace(MODEL, num_layers=num_layers)
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in model.parameter_shapes().items()}
    stored = {}
    for rule in rules(model):
        key = rule.checkpoint_key
        if rule.layer is not None:
            key = f"decoder.layers.{rule.layer}.{key.removeprefix('decoder.layers.')}"
        stored[key] = to_megatron(rule, [weights[name] for name in rule.hf_names], model)
    dcp.save(stored, checkpoint_id=folder)
    write_common_files(folder, num_steps=None)
    return weights


def test_layers_that_are_stored_one_by_one_are_read(tmp_path: Path) -> None:
    assert_gives(tmp_path, write_layers_apart(tmp_path, num_layers=3))


@pytest.mark.parametrize(("num_layers", "message"), [(4, "has more than 3 layers, but config.json describes 3"), (2, "lacks")])
def test_another_number_of_layers_is_refused(tmp_path: Path, num_layers: int, message: str) -> None:
    write_layers_apart(tmp_path, num_layers=num_layers)
    with pytest.raises(ConfigError, match=message):
        open_weights(tmp_path, MODEL)


_LAYER, _NORM = "decoder.layers.mlp.linear_fc2.weight", "decoder.final_layernorm.weight"
_EMBEDDING = "embedding.word_embeddings.weight"


@pytest.mark.parametrize(
    ("key", "stored", "expected"),
    [
        (_LAYER, (3, 8, 7), "[8, 6] for each layer"),
        (_LAYER, (3, 9, 6), "[8, 6] for each layer"),
        (_LAYER, (3, 8), "[8, 6] for each layer"),
        (_NORM, (9,), "[8]"),
        (_EMBEDDING, (11, 8), "[12, 8]"),
        (_EMBEDDING, (12, 9), "[12, 8]"),
        (_EMBEDDING, (16, 8, 1), "[12, 8]"),
        ("output_layer.weight", (16, 9), "[12, 8]"),
    ],
)
def test_only_a_vocabulary_may_have_more_rows_than_config_json_says(key: str, stored: tuple[int, ...], expected: str) -> None:
    padded = TorchDistWeights(_folder_of({**_shapes(), _EMBEDDING: (16, 8)}), MODEL)
    assert padded.specs["model.embed_tokens.weight"].shape == (12, 8)
    said = f"folder holds {key} in the shape {[*stored]}, but by config.json it is {expected}; it is of another model."
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        TorchDistWeights(_folder_of({**_shapes(), key: stored}), MODEL)


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of MODEL's tensors, by key."""
    expected, found = MODEL.parameter_shapes(), {}
    for rule in rules(MODEL):
        rows = sum(expected[name][0] for name in rule.hf_names)
        layers = () if rule.layer is None else (MODEL.num_layers,)
        found[rule.checkpoint_key] = (*layers, rows, *expected[rule.hf_names[0]][1:])
    return found


def _folder_of(shapes: dict[str, tuple[int, ...]]) -> SimpleNamespace:
    """Return a folder as far as its list of tensors is read."""
    return SimpleNamespace(folder=Path("folder"), tensors={key: torch.empty(shape) for key, shape in shapes.items()})


def test_modules_ask_for_an_entry_of_each_layer() -> None:
    modules = ["core_attention", "linear_qkv", "linear_proj", "q_layernorm", "k_layernorm"]
    names = [*(f"self_attention.{module}" for module in modules), "mlp.linear_fc1", "mlp.linear_fc2"]
    expected = [f"decoder.layers.{name}._extra_state/shard_{layer}_2" for name in names for layer in (0, 1)]
    end = "decoder.final_layernorm._extra_state/shard_0_1"
    assert [*extra_states(replace(QWEN3_4B, num_layers=2))] == [*expected, end]
    without = [key for key in expected if "q_layernorm" not in key and "k_layernorm" not in key]
    assert [*extra_states(replace(QWEN3_4B, num_layers=2, qk_norm=False))] == [*without, end]
