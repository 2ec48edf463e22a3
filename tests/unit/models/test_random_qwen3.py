import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwench.errors import ConfigError
from qwench.models import random_qwen3
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.random_qwen3 import SIZES, ModelSize, find_size, make_checkpoint, random_weights

TOKENIZER = build_small_tokenizer()
SMALLER, QWENS = ("vocab_size", "head_dim", "std"), (151_936, 128, 0.02)


def test_tiny_checkpoint_loads_in_transformers_and_generates(tmp_path):
    make_checkpoint(tmp_path, size="tiny", tokenizer=TOKENIZER, seed=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size >= len(tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    output = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert output.shape == (1, 5)


def test_stop_ids_are_end_of_turn_and_end_of_text(tmp_path):
    make_checkpoint(tmp_path, size="tiny", tokenizer=TOKENIZER)
    stop_ids = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert TOKENIZER.convert_ids_to_tokens(stop_ids) == ["<|im_end|>", "<|endoftext|>"]


def test_weights_are_normal_with_norms_of_one(tmp_path):
    config = make_checkpoint(tmp_path, size="tiny", tokenizer=TOKENIZER)
    weights = dict(random_weights(config, seed=0, dtype=torch.float32))
    matrices = [weight.flatten() for name, weight in weights.items() if not name.endswith("norm.weight")]
    norms = [weight for name, weight in weights.items() if name.endswith("norm.weight")]
    assert len(norms) == 4 * 4 + 1
    assert all(bool((norm == 1).all()) for norm in norms)
    values = torch.cat(matrices)
    # 1.8M values: the standard error of the deviation is 0.02 / sqrt(3.6e6) = 1e-5.
    assert abs(values.std().item() - 0.02) < 1e-4
    assert abs(values.mean().item()) < 1e-4
    # A made checkpoint has the wider spread of its size.
    written = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].float()
    assert written.numel() >= 30_000 and abs(written.std().item() - 0.08) < 2e-3


def test_same_seed_same_bytes_and_another_seed_differs(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint(tmp_path / name, size="tiny", tokenizer=TOKENIZER, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not an empty folder"):
        make_checkpoint(tmp_path, size="tiny", tokenizer=TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_size_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"'5B'; known: tiny, 30M, 60M, 0\.6B"):
        make_checkpoint(tmp_path / "model", size="5B", tokenizer=TOKENIZER)
    assert not (tmp_path / "model").exists()


def test_older_readers_find_the_rotary_base_at_the_top_level(tmp_path):
    make_checkpoint(tmp_path, size="tiny", tokenizer=TOKENIZER)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 1e6


def test_a_folder_replaces_what_a_killed_call_left_and_is_as_large_as_was_asked_for(tmp_path, monkeypatch):
    asked, folder = [], tmp_path / "new" / "model"
    (tmp_path / "new").mkdir()
    folder.with_name("model.writing").mkdir()
    (folder.with_name("model.writing") / "old").touch()
    monkeypatch.setattr(random_qwen3, "check_can_hold", lambda path, *, flag, nbytes: asked.append((path, flag, nbytes)))
    make_checkpoint(folder, size="tiny", tokenizer=TOKENIZER, seed=3)
    weights = load_file(folder / "model.safetensors")
    assert asked == [(folder, "--output", sum(weight.nbytes for weight in weights.values()))]
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert not (folder / "old").exists() and [path.name for path in folder.parent.iterdir()] == ["model"]
    saved = json.loads((folder / "config.json").read_text())
    assert (folder / "config.json").read_text() == json.dumps(saved, indent=2, sort_keys=True) + "\n"
    ids = [TOKENIZER.eos_token_id, TOKENIZER.pad_token_id]
    assert [saved[name] for name in ("dtype", "vocab_size", "eos_token_id", "pad_token_id")] == ["bfloat16", 320, *ids]
    assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == TOKENIZER.pad_token_id
    make_checkpoint(tmp_path / "in" / "folders", size="tiny", tokenizer=TOKENIZER)


def test_each_weight_has_a_seed_of_its_own():
    config = ModelSize(hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1).to_config(vocab_size=9)
    weights = list(random_weights(config, seed=5, dtype=torch.float32, std=0.5))
    for index in (0, 1):
        drawn = torch.randn(weights[index][1].shape, generator=torch.Generator().manual_seed(5 * 2**20 + index))
        torch.testing.assert_close(weights[index][1], drawn / 2)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    class Large:
        def __len__(self):
            return 151_937

    with pytest.raises(ConfigError, match="has 151937 tokens, but --size 4B has a vocabulary of 151936"):
        make_checkpoint(tmp_path / "model", size="4B", tokenizer=Large())


def test_instruct_2507_differs_in_the_rotary_base():
    assert find_size("4B-Instruct-2507").rope_theta == 5e6
    assert find_size("4B").rope_theta == 1e6


@pytest.mark.parametrize(
    ("name", "hidden", "ffn", "layers", "heads", "kv_heads", "tied", "rope_theta", "positions", *SMALLER),
    [
        ("tiny", 128, 512, 4, 4, 2, True, 1e6, 4096, None, 32, 0.08),
        ("30M", 512, 1536, 10, 8, 4, True, 1e6, 8192, None, 64, 0.04),
        ("60M", 768, 2048, 10, 12, 4, True, 1e6, 8192, None, 64, 0.036),
        ("0.6B", 1024, 3072, 28, 16, 8, True, 1e6, 40_960, *QWENS),
        ("1.7B", 2048, 6144, 28, 16, 8, True, 1e6, 40_960, *QWENS),
        ("4B", 2560, 9728, 36, 32, 8, True, 1e6, 40_960, *QWENS),
        ("4B-Instruct-2507", 2560, 9728, 36, 32, 8, True, 5e6, 262_144, *QWENS),
        ("8B", 4096, 12288, 36, 32, 8, False, 1e6, 40_960, *QWENS),
        ("14B", 5120, 17408, 40, 40, 8, False, 1e6, 40_960, *QWENS),
        ("32B", 5120, 25600, 64, 64, 8, False, 1e6, 40_960, *QWENS),
    ],
)
def test_sizes_are_the_small_ones_and_those_that_qwen_published(
    name, hidden, ffn, layers, heads, kv_heads, tied, rope_theta, positions, vocab_size, head_dim, std
):
    size = find_size(name)
    assert (size.hidden_size, size.intermediate_size, size.num_layers, size.num_heads, size.num_kv_heads) == (
        hidden, ffn, layers, heads, kv_heads,
    )  # fmt: skip
    assert (size.tied, size.rope_theta, size.max_position_embeddings, size.vocab_size, size.head_dim, size.initial_std) == (
        tied, rope_theta, positions, vocab_size, head_dim, std,
    )  # fmt: skip
    assert list(SIZES) == ["tiny", "30M", "60M", "0.6B", "1.7B", "4B", "4B-Instruct-2507", "8B", "14B", "32B"]


def test_the_configuration_has_the_shape():
    shape = {"hidden_size": 8, "intermediate_size": 12, "head_dim": 4, "max_position_embeddings": 64}
    size = ModelSize(num_layers=3, num_heads=6, num_kv_heads=2, tied=False, rope_theta=5e4, **shape)
    config = size.to_config(vocab_size=99).to_dict()
    expected = {
        **shape,
        "vocab_size": 99,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "rms_norm_eps": 1e-6,
        "architectures": ["Qwen3ForCausalLM"],
    }
    assert {name: config[name] for name in expected} == expected
