import base64
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen3Config

from qwench.errors import ConfigError
from qwench.models.built_tokenizers import (
    QWEN3_CHAT_TEMPLATE,
    build_qwen_tokenizer,
    build_small_tokenizer,
    find_qwen_tiktoken,
    read_tiktoken,
)

SMALL = build_small_tokenizer()


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def write_tiktoken(path: Path, merged: list[bytes]) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + merged
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


@given(st.text())
def test_small_tokenizer_round_trips_any_text(text):
    assert SMALL.decode(encode(SMALL, text)) == text


def test_small_tokenizer_splits_numbers_into_digits_and_keeps_boxed_whole():
    tokens = SMALL.convert_ids_to_tokens(encode(SMALL, "\\boxed{120}"))
    assert tokens == ["\\boxed{", "1", "2", "0", "}"]


def test_small_tokenizer_knows_a_word_only_when_it_stands_alone():
    assert SMALL.convert_ids_to_tokens(encode(SMALL, "user")) == ["user"]
    assert SMALL.convert_ids_to_tokens(encode(SMALL, "users")) == list("users")


@pytest.mark.parametrize("word", ["\\boxed{", "user", "assistant", "system", "\n\n"])
def test_words_of_the_arithmetic_tasks_are_one_token(word):
    assert len(encode(SMALL, word)) == 1 and len(SMALL) == 256 + 5 + 9


def test_both_tokenizers_are_saved_with_what_qwen3s_own_says(tmp_path):
    for tokenizer in (SMALL, build_qwen_tokenizer(write_tiktoken(tmp_path / "q.tiktoken", [b"th"]))):
        tokenizer.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
        expected = {"model_max_length": 131_072, "clean_up_tokenization_spaces": False}
        expected |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        assert {name: saved[name] for name in expected} == expected and saved.get("unk_token") is None
        assert tokenizer.chat_template == QWEN3_CHAT_TEMPLATE
        markup = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
        assert {"<think>", "</think>", "<tool_call>", "</tool_response>"} < {*markup} and "<|im_start|>" not in markup
        assert not any(token.normalized for token in tokenizer.added_tokens_decoder.values())


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"])
def test_special_tokens_are_single(token):
    assert len(encode(SMALL, f"a{token}b")) == 3


def test_think_tokens_survive_skipping_special_tokens_and_turn_markers_do_not():
    ids = encode(SMALL, "<|im_start|><think>x</think><|im_end|>")
    assert SMALL.decode(ids, skip_special_tokens=True) == "<think>x</think>"


def test_small_tokenizer_is_the_same_after_saving_beside_a_qwen3_config(tmp_path):
    SMALL.save_pretrained(tmp_path)
    Qwen3Config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\n\\boxed{12}\n\nusers<|im_end|>"
    assert encode(loaded, text) == encode(SMALL, text)
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_qwen_tokenizer_follows_tiktoken_ranks(tmp_path):
    # Ranks 256.. : "th", "at", "that", " that"; "tha" is not a token, so "that" is th + at.
    tokenizer = build_qwen_tokenizer(write_tiktoken(tmp_path / "q.tiktoken", [b"th", b"at", b"that", b" that"]))
    assert encode(tokenizer, "that") == [258]
    assert encode(tokenizer, "hat that") == [ord("h"), 257, 259]
    assert encode(tokenizer, "12") == [ord("1"), ord("2")]


def test_qwen_special_tokens_follow_the_ranks_in_qwen3_order(tmp_path):
    tokenizer = build_qwen_tokenizer(write_tiktoken(tmp_path / "q.tiktoken", [b"th"]))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
    # Offsets of Qwen3's own ids from its 151,643 ranks: 151643, 151644, 151645, 151657, 151658, 151667, 151668.
    assert tokenizer.convert_tokens_to_ids(names) == [257 + offset for offset in (0, 1, 2, 14, 15, 24, 25)]
    assert len(tokenizer) == 257 + 26


def test_qwen_tokenizer_round_trips_after_saving(tmp_path):
    tokenizer = build_qwen_tokenizer(write_tiktoken(tmp_path / "q.tiktoken", ["\u00e9".encode(), b"ab"]))
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "<think>\nab\u00e9 \u65e5\u672c 12</think>\n"
    assert encode(loaded, text) == encode(tokenizer, text)
    assert loaded.decode(encode(loaded, text)) == text


def test_qwen_merges_prefer_the_lowest_rank_not_the_first_split(tmp_path):
    # "abc" can be cut a+bc or ab+c; "bc" has the lower rank, so byte-pair encoding arrives at a+bc.
    tokenizer = build_qwen_tokenizer(write_tiktoken(tmp_path / "q.tiktoken", [b"bc", b"ab", b"abc"]))
    assert encode(tokenizer, "abc") == [258]
    assert encode(tokenizer, "ab") == [257]


def test_tiktoken_file_with_a_broken_line_is_refused_by_line(tmp_path):
    path = tmp_path / "broken.tiktoken"
    path.write_text("IQ== 0\nnot base64 at all\n")
    with pytest.raises(ConfigError, match=r"broken\.tiktoken:2"):
        read_tiktoken(path)


def test_tiktoken_ranks_that_no_merge_reaches_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="rank 256"):
        build_qwen_tokenizer(write_tiktoken(tmp_path / "q.tiktoken", [b"abc"]))


def test_missing_tiktoken_file_names_the_flag(tmp_path):
    with pytest.raises(ConfigError, match="--qwen-tiktoken"):
        build_qwen_tokenizer(tmp_path / "none.tiktoken")


@pytest.mark.parametrize("holds_it", [True, False])
def test_the_file_of_an_installed_dashscope_is_found(monkeypatch, tmp_path, holds_it):
    file = tmp_path / "resources" / "qwen.tiktoken"
    file.parent.mkdir()
    origin = {"dashscope": str(tmp_path / "__init__.py")}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=origin[name]))
    if holds_it:
        assert build_qwen_tokenizer(write_tiktoken(file, [])).convert_tokens_to_ids("<|endoftext|>") == 256
    else:
        with pytest.raises(ConfigError, match="pip install dashscope"):
            find_qwen_tiktoken()


def test_ranks_are_read_in_order(tmp_path):
    (tmp_path / "q.tiktoken").write_text("Yg== 1\nYQ== 0\n")
    assert list(read_tiktoken(tmp_path / "q.tiktoken").items()) == [(b"a", 0), (b"b", 1)]
    (tmp_path / "q.tiktoken").write_text("Y*Q== 0\n")
    with pytest.raises(ConfigError, match=r"q\.tiktoken:1 is not"):
        read_tiktoken(tmp_path / "q.tiktoken")


def test_absent_dashscope_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install dashscope"):
        find_qwen_tiktoken()
