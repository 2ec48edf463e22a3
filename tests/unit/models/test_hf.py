import json
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from qwench import __version__
from qwench.errors import CheckpointError, ConfigError
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.hf import (
    load_hf_config,
    load_model,
    load_tokenizer,
    model_of,
    stop_token_ids,
    write_companions,
    write_hf_checkpoint,
)
from qwench.models.random_qwen3 import make_checkpoint
from qwench.models.shards import write_shards

TOKENIZER = build_small_tokenizer()
TOKENS = torch.tensor([[5, 6, 7, 8, 200, 264]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    make_checkpoint(folder, size="tiny", tokenizer=TOKENIZER, seed=1)
    return folder


def new_weights(source):
    """A model that differs from its source, as after training."""
    model = load_model(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def buckets_of(model, size: int):
    weights = [(name, tensor.detach()) for name, tensor in model.state_dict().items()]
    return [weights[i : i + size] for i in range(0, len(weights), size)]


def edit_config(source, folder, **changes):
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10**6], ids=["one-shard", "shards"])
def test_transformers_loads_an_export_with_equal_logits(source, tmp_path, max_shard_bytes):
    model = new_weights(source)
    write_hf_checkpoint(tmp_path / "export", buckets_of(model, 7), source=source, max_shard_bytes=max_shard_bytes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.generation_config.eos_token_id == [263, 261]
    text = "<|im_start|>user\n\\boxed{1}"
    exported_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert exported_tokenizer.encode(text) == TOKENIZER.encode(text)
    assert exported_tokenizer.chat_template == TOKENIZER.chat_template


def test_shards_respect_the_size_and_the_index_maps_every_weight(source, tmp_path):
    model = new_weights(source)
    template = "{{ messages[0].content }}!"
    write_hf_checkpoint(tmp_path / "export", buckets_of(model, 1), source=source, max_shard_bytes=10**6, chat_template=template)
    assert load_tokenizer(tmp_path / "export").chat_template == template
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    names = [name for name, _ in model.named_parameters()]
    assert sorted(index["weight_map"]) == sorted(names)
    assert index["metadata"]["total_size"] == sum(4 * parameter.numel() for parameter in model.parameters())
    files = sorted(path.name for path in (tmp_path / "export").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file in files:
        tensors = load_file(tmp_path / "export" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 10**6
        assert {index["weight_map"][name] for name in tensors} == {file}


def test_tied_output_layer_is_written_once(source, tmp_path):
    model = new_weights(source)
    assert "lm_head.weight" in model.state_dict()
    write_hf_checkpoint(tmp_path / "export", buckets_of(model, 5), source=source)
    assert "lm_head.weight" not in load_file(tmp_path / "export" / "model.safetensors")


def test_buckets_may_reuse_their_memory(source, tmp_path):
    model = new_weights(source)

    def reusing():
        memory = torch.empty(max(parameter.numel() for parameter in model.parameters()))
        for name, parameter in model.named_parameters():
            view = memory[: parameter.numel()].view(parameter.shape)
            view.copy_(parameter.detach())
            yield [(name, view)]

    write_hf_checkpoint(tmp_path / "export", reusing(), source=source)
    assert torch.equal(load_model(tmp_path / "export", dtype=torch.float32)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("names", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_config_keeps_everything_but_the_dtype(source, tmp_path, names):
    folder = edit_config(source, tmp_path / "old", note="kept")
    before = json.loads((folder / "config.json").read_text())
    del before["dtype"]
    (folder / "config.json").write_text(json.dumps(before | dict.fromkeys(names, "bfloat16")))
    write_companions(tmp_path, folder, {"model.norm.weight": torch.float32})
    assert json.loads((tmp_path / "config.json").read_text()) == {**before, **dict.fromkeys(names or ["dtype"], "float32")}


def test_every_file_of_a_tokenizer_comes_along(source, tmp_path):
    folder = edit_config(source, tmp_path / "model")
    names = (
        "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
        "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    )  # fmt: skip
    for name in names:
        (folder / name).write_text(f"{name} of the source")
    (folder / "notes.txt").write_text("not of a model")
    write_hf_checkpoint(tmp_path / "export", buckets_of(new_weights(source), 9), source=folder)
    assert {name: (tmp_path / "export" / name).read_text() for name in names} == {
        name: f"{name} of the source" for name in names
    }
    assert not (tmp_path / "export" / "notes.txt").exists()


def test_an_export_replaces_what_a_killed_run_left_and_says_who_wrote_it(source, tmp_path):
    partial = tmp_path / "runs" / "export.writing"
    partial.mkdir(parents=True)
    (partial / "half").touch()
    write_hf_checkpoint(tmp_path / "runs" / "export", buckets_of(new_weights(source), 9), source=source)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["export"]
    assert not (tmp_path / "runs" / "export" / "half").exists()
    assert json.loads((tmp_path / "runs" / "export" / "qwench_export.json").read_text()) == {"qwench_version": __version__}
    text = (tmp_path / "runs" / "export" / "config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    write_hf_checkpoint(tmp_path / "new" / "export", buckets_of(new_weights(source), 9), source=source)


@pytest.mark.parametrize(("most", "files"), [(20, ["ab", "cd", "e"]), (19, list("abcde")), (5, list("abcde")), (50, ["abcde"])])
def test_a_shard_is_filled_to_its_last_byte(tmp_path, most, files):
    weights = [[(name, torch.zeros(10, dtype=torch.uint8))] for name in "abcde"]
    assert write_shards(tmp_path, weights, max_shard_bytes=most) == dict.fromkeys("abcde", torch.uint8)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in written] == [list(names) for names in files]
    assert {file.stat().st_mode & 0o777 for file in written} == {0o644}


def test_the_row_of_the_padding_token_is_trained(source):
    assert load_model(source).get_input_embeddings().padding_idx is None
    config = load_hf_config(source)
    config.pad_token_id = 3
    model = model_of(config, dict(load_file(source / "model.safetensors")), dtype=torch.bfloat16)
    assert model.get_input_embeddings().padding_idx is None and not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "sdpa"


def test_transformers_warns_as_before_after_a_configuration_was_read(source, tmp_path):
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        logger.setLevel(logging.INFO)
        load_hf_config(source)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_hf_config(edit_config(source, tmp_path / "model", hidden_size="wide"))
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(level)


def test_an_earlier_export_is_replaced_and_nothing_else_is(source, tmp_path):
    model = load_model(source, dtype=torch.bfloat16)
    for _ in range(2):
        write_hf_checkpoint(tmp_path / "export", buckets_of(model, 9), source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="was not written by an export"):
        write_hf_checkpoint(source, buckets_of(new_weights(source), 9), source=source)
    assert (source / "model.safetensors").read_bytes() == before


def test_missing_or_unknown_weights_leave_no_folder(source, tmp_path):
    (whole,) = buckets_of(load_model(source, dtype=torch.bfloat16), 1000)
    with pytest.raises(CheckpointError, match=r"lacks weight model\.norm\.weight"):
        write_hf_checkpoint(tmp_path / "export", [[w for w in whole if w[0] != "model.norm.weight"]], source=source)
    with pytest.raises(CheckpointError, match=r"has the unknown weight extra"):
        write_hf_checkpoint(tmp_path / "export", [whole, [("extra", torch.ones(1))]], source=source)
    assert list(tmp_path.iterdir()) == []


def test_failure_while_writing_leaves_the_earlier_export(source, tmp_path):
    model = load_model(source, dtype=torch.bfloat16)
    write_hf_checkpoint(tmp_path / "export", buckets_of(model, 9), source=source)
    before = (tmp_path / "export" / "model.safetensors").read_bytes()

    def failing():
        yield buckets_of(model, 9)[0]
        raise RuntimeError("lost a rank")

    with pytest.raises(RuntimeError, match="lost a rank"):
        write_hf_checkpoint(tmp_path / "export", failing(), source=source)
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_missing_and_broken_configs_are_one_line_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json in .*nowhere"):
        load_hf_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not readable JSON"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'; supported are dense qwen3, qwen2, llama"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"hidden_size": "wide"}, "cannot be read as a qwen3 configuration"),
    ],
)
def test_what_we_cannot_train_is_refused(source, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_hf_config(edit_config(source, tmp_path / "model", **changes))
    assert "\n" not in str(caught.value)


def test_folder_without_weights_is_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        load_model(edit_config(source, tmp_path / "model"), dtype=torch.float32)


def test_incomplete_weights_are_refused(source, tmp_path):
    folder = edit_config(source, tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(folder, dtype=torch.float32)


def test_weights_of_another_shape_are_refused(source, tmp_path):
    folder = edit_config(source, tmp_path / "model", intermediate_size=256)
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"in the shape \[512, 128\], but config\.json describes \[256, 128\]"):
        load_model(folder, dtype=torch.float32)


def test_model_has_the_dtype_and_attention_asked_for(source):
    model = load_model(source, dtype=torch.float32, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_tokenizer_of_a_folder_without_one_is_refused(source, tmp_path):
    assert load_tokenizer(source).encode("\\boxed{") == [256]
    with pytest.raises(ConfigError, match="no tokenizer in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_chat_template_that_cannot_be_read_is_named_by_its_flag(source, tmp_path, content):
    template = tmp_path / "chat.jinja"
    if content is not None:
        template.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^--chat-template-path: .*chat\.jinja cannot be read: "):
        load_tokenizer(source, chat_template=template)


def test_stop_ids_are_those_of_all_three_sources(source, tmp_path):
    assert stop_token_ids(source, TOKENIZER) == (261, 263)
    Qwen3Config(eos_token_id=7).save_pretrained(tmp_path)
    assert stop_token_ids(tmp_path, TOKENIZER) == (7, 263)
    without = SimpleNamespace(eos_token_id=None)
    assert stop_token_ids(tmp_path, without) == (7,)
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, true]}')
    with pytest.raises(ConfigError, match=r"config\.json has eos_token_id \[7, True\]; it must be the id of a token"):
        stop_token_ids(tmp_path, without)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"names no end-of-sequence token; set eos_token_id in its generation_config\.json"):
        stop_token_ids(tmp_path, without)


def test_llama_folders_load(tmp_path):
    LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    assert load_hf_config(tmp_path).model_type == "llama"


@pytest.mark.parametrize("is_fp8", [False, True])
def test_the_dtype_of_a_folder_is_that_of_weights_that_are_not_quantized(source, tmp_path, is_fp8):
    name = "model.layers.0.mlp.up_proj.weight"
    quantized = {name: torch.float8_e4m3fn, f"{name}_scale_inv": torch.float32} if is_fp8 else {}
    write_companions(tmp_path, source, quantized | {"model.norm.weight": torch.bfloat16})
    written = json.loads((tmp_path / "config.json").read_text())
    assert {written.get("dtype"), written.get("torch_dtype")} - {None} == {"bfloat16"}
    assert ("quantization_config" in written) is is_fp8
