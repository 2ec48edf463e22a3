"""A folder of weights means one model to every reader, or is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwench.checkpoints.formats.sources import HfWeights
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.errors import CheckpointError, ConfigError
from qwench.models.architecture import Architecture
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.hf import architecture_of, check_vocabulary, load_hf_config, load_model, load_tokenizer
from qwench.models.hf_weights import find_parameters
from qwench.models.random_qwen3 import make_checkpoint
from tests.contract.engine_hosts import settings_of

EMBEDDING = "model.embed_tokens.weight"
Json = dict[str, object]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(folder, size="tiny", tokenizer=build_small_tokenizer(), seed=1)
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(folder: Path, *, tensors: Callable[[dict[str, Tensor]], object] | None = None, **config: object) -> None:
    if tensors is not None:
        held = load_file(folder / "model.safetensors")
        tensors(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))


def read_by_trainer(folder: Path, architecture: Architecture) -> None:
    load_model(folder)


def read_by_engine(folder: Path, architecture: Architecture) -> None:
    EmbeddedEngine.from_checkpoint(folder, settings_of(kv_cache_tokens=64, dtype=torch.float32))


def read_by_converter(folder: Path, architecture: Architecture) -> None:
    HfWeights(folder, architecture)


READERS = [read_by_trainer, read_by_engine, read_by_converter]


@pytest.fixture(params=READERS, ids=lambda reader: reader.__name__)
def refused(request: pytest.FixtureRequest) -> Iterator[Callable[[Path, str], None]]:
    def check(folder: Path, message: str) -> None:
        with pytest.raises((ConfigError, CheckpointError), match=message) as caught:
            request.param(folder, architecture_of(load_hf_config(folder)))
        assert "\n" not in str(caught.value)

    yield check


@pytest.mark.parametrize("reader", READERS)
def test_a_tied_head_that_equals_the_embedding_is_accepted(folder: Path, reader: Callable[[Path, Architecture], None]) -> None:
    edit(folder, tensors=lambda held: held.update({"lm_head.weight": held[EMBEDDING].clone()}))
    architecture = architecture_of(load_hf_config(folder))
    reader(folder, architecture)
    assert "lm_head.weight" not in HfWeights(folder, architecture).specs


def test_a_tied_head_that_differs_is_refused(folder: Path, refused: Callable[[Path, str], None]) -> None:
    edit(folder, tensors=lambda held: held.update({"lm_head.weight": held[EMBEDDING] * 2}))
    refused(folder, "config.json ties lm_head to the embeddings, but the weights differ")


def test_a_tied_head_with_one_other_bit_is_refused(folder: Path, refused: Callable[[Path, str], None]) -> None:
    def last_bit(held: dict[str, Tensor]) -> None:
        head = held[EMBEDDING].clone()
        head.view(torch.int16)[-1, -1] ^= 1
        held["lm_head.weight"] = head

    edit(folder, tensors=last_bit)
    refused(folder, "the weights differ")


def test_an_untied_model_without_a_head_is_refused(folder: Path, refused: Callable[[Path, str], None]) -> None:
    edit(folder, tie_word_embeddings=False)
    refused(folder, "lacks lm_head.weight")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (128,)),
        ("model.layers.4.mlp.up_proj.weight", (512, 128)),
        ("model.layers.1.mlp.gate_proj.lora_A.weight", (2, 128)),
        ("score.weight", (1, 128)),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (4, 1)),
    ],
)
def test_a_tensor_that_no_config_announces_is_refused(
    folder: Path, refused: Callable[[Path, str], None], name: str, shape: tuple[int, ...]
) -> None:
    edit(folder, tensors=lambda held: held.update({name: torch.ones(shape)}))
    refused(folder, f"holds {name}, which its config.json does not describe")


def test_a_model_cut_short_by_its_config_is_refused(folder: Path, refused: Callable[[Path, str], None]) -> None:
    edit(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    refused(folder, r"holds model\.layers\.3\..* \(11 such tensors\)")


def test_a_shape_that_differs_names_the_first_tensor_and_both_shapes(
    folder: Path, refused: Callable[[Path, str], None]
) -> None:
    def halve(held: dict[str, Tensor]) -> None:
        for name in [name for name in held if name.endswith("up_proj.weight")]:
            held[name] = held[name][:256].clone()

    edit(folder, tensors=halve)
    refused(folder, r"holds model\.layers\.0\.mlp\.up_proj\.weight in the shape \[256, 128\], but config\.json .* \[512, 128\]")


def test_weights_that_are_no_numbers_are_refused(folder: Path, refused: Callable[[Path, str], None]) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    edit(folder, tensors=lambda held: held.update({name: held[name].to(torch.int8)}))
    refused(folder, rf"holds {name} as int8")


def test_fp8_values_that_no_config_announces_are_refused(folder: Path, refused: Callable[[Path, str], None]) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    edit(folder, tensors=lambda held: held.update({name: held[name].to(torch.float8_e4m3fn)}))
    refused(folder, rf"holds {name} as float8_e4m3fn")


def test_fp8_that_is_announced_and_not_there_is_refused(folder: Path, refused: Callable[[Path, str], None]) -> None:
    edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    refused(folder, r"lacks model\.layers\.0\.self_attn\.q_proj\.weight_scale_inv")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors"])
def test_other_quantization_is_refused_by_name(folder: Path, method: str) -> None:
    edit(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ConfigError, match=f"quantized weights of a kind that is not read: .*{method}"):
        load_hf_config(folder)


def split(folder: Path) -> dict[str, str]:
    """Replace the single file by two shards; return the index."""
    held = load_file(folder / "model.safetensors")
    names = sorted(held)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, members in shards.items():
        save_file({name: held[name] for name in members}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_shards_are_read_by_all(folder: Path) -> None:
    index, architecture = split(folder), architecture_of(load_hf_config(folder))
    for reader in READERS:
        reader(folder, architecture)
    assert set(HfWeights(folder, architecture).specs) == set(index)


def test_a_shard_that_is_absent_is_named(folder: Path, refused: Callable[[Path, str], None]) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "lacks model-00002-of-00002.safetensors, which .* names; is the download complete")


def test_a_whole_file_beside_shards_is_refused(tiny: Path, folder: Path, refused: Callable[[Path, str], None]) -> None:
    split(folder)
    shutil.copyfile(tiny / "model.safetensors", folder / "model.safetensors")
    refused(folder, "model.safetensors beside the shards")


def test_a_tensor_that_the_index_does_not_list_is_refused(folder: Path, refused: Callable[[Path, str], None]) -> None:
    index = split(folder)
    del index["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(folder, r"holds model\.norm\.weight, which .* does not place in it")


def test_an_index_points_to_no_other_folder(folder: Path, refused: Callable[[Path, str], None]) -> None:
    index = {**split(folder), "model.norm.weight": "../elsewhere/model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(folder, "shards lie beside it")


def test_a_stray_file_is_not_read(folder: Path) -> None:
    (folder / "adapter.safetensors").write_bytes(b"something else")
    architecture = architecture_of(load_hf_config(folder))
    for reader in READERS:
        reader(folder, architecture)
    assert set(HfWeights(folder, architecture).specs) == set(architecture.parameter_shapes())


def test_old_rotary_buffers_are_left_out(folder: Path) -> None:
    edit(folder, tensors=lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    architecture = architecture_of(load_hf_config(folder))
    for reader in READERS:
        reader(folder, architecture)
    assert set(find_parameters(folder, architecture)) == set(architecture.parameter_shapes())


@pytest.mark.parametrize(("stored", "expected"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_trainer_keeps_the_dtype_of_the_files(folder: Path, stored: torch.dtype, expected: torch.dtype) -> None:
    edit(folder, tensors=lambda held: held.update({name: tensor.to(stored) for name, tensor in held.items()}), dtype="float16")
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert torch.equal(model.get_input_embeddings().weight, load_file(folder / "model.safetensors")[EMBEDDING])


def test_the_row_of_the_padding_token_is_trained_as_every_other(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    assert model.config.pad_token_id == 261
    model.model(torch.tensor([[261, 7]])).last_hidden_state.square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None and gradient[261].abs().sum() > 0


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(folder: Path) -> None:
    edit(folder, tensors=lambda held: held.update({EMBEDDING: held[EMBEDDING][:120]}), vocab_size=120, pad_token_id=0)
    model = architecture_of(load_hf_config(folder))
    with pytest.raises(ConfigError, match=r"the tokenizer has 270 tokens, the model 120"):
        check_vocabulary(folder, load_tokenizer(folder), model)


def test_tokens_added_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    model = architecture_of(load_hf_config(folder))
    check_vocabulary(folder, tokenizer, model)
    tokenizer.add_tokens([f"<extra_{index}>" for index in range(320 - 270 + 1)])
    with pytest.raises(ConfigError, match=r"the tokenizer has 321 tokens, the model 320"):
        check_vocabulary(folder, tokenizer, model)


def test_a_stop_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [261, 4000]}))
    with pytest.raises(ConfigError, match="eos_token_id 4000 is outside the vocabulary of 320"):
        check_vocabulary(folder, load_tokenizer(folder), architecture_of(load_hf_config(folder)))


@pytest.mark.parametrize("value", ["263", {"id": 263}, True, [263, None], 1.5])
def test_a_stop_token_that_is_no_id_is_refused(folder: Path, value: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match="eos_token_id"):
        check_vocabulary(folder, load_tokenizer(folder), architecture_of(load_hf_config(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100, "pad_token_id": 261}, "pad_token_id 261 is outside the vocabulary of 100"),
        ({"pad_token_id": -1}, "pad_token_id -1 is outside the vocabulary of 320"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_key_value_heads": 3}, "4 attention heads for 3 key-value heads"),
        ({"head_dim": 33}, "33"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0; it must be a finite number above 0"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"dtype": []}, r"has dtype \[\]; known: float32"),
        ({"torch_dtype": "int8"}, "has torch_dtype 'int8'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings 0"),
        ({"max_position_embeddings": 10**9}, "allows 1000000000 positions; float32 tells 16777216 apart"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding_attention"),
        ({"rope_theta": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling beside rope_parameters"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6, "short_factor": [1.0] * 16,
                              "long_factor": [2.0] * 16}}, "rope type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope parameters for full_attention; known: one set"),
        ({"transformers_weights": "other.safetensors"}, "has transformers_weights, which is not supported"),
        ({"text_config": {"hidden_size": 5}}, "has text_config, which is not supported"),
        *(({name: {}}, f"has {name}, which is not supported") for name in ("text_encoder", "decoder", "generator")),
        ({"is_causal": False}, "is_causal false; only models that read left to right"),
        ({"num_labels": 10_001}, "more than 10000 num_labels"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_model_is_refused_by_name(folder: Path, change: Json, message: str) -> None:
    edit(folder, **change)
    with pytest.raises(ConfigError, match=message) as caught:
        architecture_of(load_hf_config(folder))
    assert "\n" not in str(caught.value)


def test_a_config_may_say_what_changes_nothing(folder: Path) -> None:
    edit(folder, num_labels=10_000, is_causal=True, text_config=None, dtype=None)
    assert load_hf_config(folder).num_labels == 10_000


def test_an_adapter_is_refused_by_name(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a LoRA adapter; merge it into its base model with qwench convert"):
        load_hf_config(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 3}', b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_refused(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"the tokenizer in .* cannot be loaded") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_pipe_in_the_place_of_config_json_is_refused_at_once(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json is no regular file"):
        load_hf_config(folder)


@pytest.mark.parametrize(
    ("kind", "message"), [("pairs", "does not map names of tensors to names of files"), ("endless", "cannot be read")]
)
def test_an_index_that_is_none_is_refused(folder: Path, kind: str, message: str) -> None:
    index = folder / "model.safetensors.index.json"
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index.write_text(json.dumps({"weight_map": [[name, "a.safetensors"] for name in names]}))
    if kind == "endless":
        with index.open("r+b") as stream:
            stream.truncate(2**30)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json {message}"):
        find_parameters(folder, architecture_of(load_hf_config(folder)))
