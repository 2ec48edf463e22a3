"""Messages as the text that the model reads."""

import json
from contextlib import nullcontext

import pytest
from tokenizers.processors import TemplateProcessing

from qwench.data.chat import ChatRenderer, as_messages, tokenize
from qwench.errors import ConfigError
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.unit.data.test_prompts import TOKENIZER, load, load_one


@pytest.mark.parametrize("text", ["hi", "x" * 300_000])
def test_a_template_that_writes_far_more_than_it_is_given_is_refused_and_a_long_row_is_not(tmp_path, text):
    endless = build_small_tokenizer()
    load(tmp_path, [{"prompt": text}], tokenizer=endless, apply_chat_template=True)
    endless.chat_template = "{{ 'x' * 5000000 }}{{ messages[-1]['content'] }}"
    with pytest.raises(ConfigError, match=r"jsonl:1: the chat template writes 5,\d+,\d+ characters around a far shorter"):
        load(tmp_path, [{"prompt": text}], tokenizer=endless, apply_chat_template=True)
    endless.chat_template = "{{ 'x' * 1000 }}{{ messages[-1]['content'] }}"  # far more than a short row, and yet short
    assert load_one(tmp_path, {"prompt": text}, tokenizer=endless, apply_chat_template=True).text == "x" * 1000 + text


@pytest.mark.parametrize(
    ("size", "most"), [(2, 2**20), (200_000, 10 * (200_000 + len("([{'role': 'user', 'content': ''}], None)")))]
)
def test_a_template_may_write_a_million_characters_or_ten_times_what_it_is_given(size, most):
    filling = build_small_tokenizer()
    filling.chat_template = "{{ messages[-1]['content'] }}{{ 'x' * n }}"
    message = {"role": "user", "content": "x" * size}
    for extra in (0, 1):
        renderer = ChatRenderer(filling, template_kwargs={"n": most + extra - size})
        with nullcontext() if not extra else pytest.raises(ConfigError, match=f"writes {most + 1:,} characters"):
            assert len(renderer.render([message])) == most


def test_each_role_is_tried_where_it_may_stand():
    picky = build_small_tokenizer()
    picky.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or m.role == 'system' and loop.first or m.role == 'assistant' and "
        "messages[0].role == 'user' %}{{ m['content'] + ';' }}{% endif %}{% endfor %}"
    )
    system, asked, answer = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    assert ChatRenderer(picky).render([system, asked]) == "system;user;"
    assert ChatRenderer(picky).render([asked, answer]) == "user;assistant;"
    with pytest.raises(ConfigError, match="role 'critic' is not one that the chat template writes"):
        ChatRenderer(picky).render([asked, {"role": "critic", "content": "no"}])


@pytest.mark.parametrize(("size", "shown"), [(80, 80), (81, 77)])
def test_what_is_refused_is_shown_up_to_a_line(size, shown):
    value = {"a": "x" * (size - len("{'a': ''}"))}
    with pytest.raises(ConfigError) as refused:
        as_messages(value, place="here")
    assert f"got {repr(value)[:shown]}{'' if shown == size else '...'}; correct" in str(refused.value)


def test_a_template_that_writes_what_is_no_text_is_refused(tmp_path):
    broken = build_small_tokenizer()
    broken.chat_template = r"{{ messages[-1]['content'] }}{{ '\x00' }}"
    with pytest.raises(ConfigError, match=r"data\.jsonl:1 holds a NUL character"):
        load(tmp_path, [{"prompt": "a"}], tokenizer=broken, apply_chat_template=True)


def test_tokenizer_without_a_template_is_refused(tmp_path):
    bare = build_small_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        load(tmp_path, [{"prompt": "x"}], tokenizer=bare, apply_chat_template=True)


def test_rendered_texts_get_no_further_special_tokens_and_no_texts_have_none():
    marking = build_small_tokenizer()
    marking.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 7)]
    )
    assert marking("a")["input_ids"] == [7, ord("a")]
    assert (tokenize(marking, ["a", "bc"]), tokenize(marking, [])) == ([[97], [98, 99]], [])


def test_content_in_text_parts_is_joined(tmp_path):
    parts = [{"type": "text", "text": "What is "}, {"text": "2+5?"}]
    prompt = load_one(tmp_path, {"prompt": [{"role": "user", "content": parts}]}, apply_chat_template=True)
    assert prompt.text == "<|im_start|>user\nWhat is 2+5?<|im_end|>\n<|im_start|>assistant\n"


def test_messages_as_json_text_are_read_as_messages(tmp_path):
    text = json.dumps([{"role": "system", "content": "Add."}, {"role": "user", "content": "2+5?"}])
    prompt = load_one(tmp_path, {"prompt": text}, apply_chat_template=True)
    assert prompt.text == "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n2+5?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "text", ["[2, 5]", "[1, 2] + [3]", '[{"x": 1}]', '[{"content": "x"}]', '[{"role": "user", "content": "x"}, 3]', "[]"]
)
def test_text_that_only_looks_like_messages_stays_text(tmp_path, text):
    prompt = load_one(tmp_path, {"prompt": text}, apply_chat_template=True)
    assert prompt.text == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages.a.b }}", "{{ raise_exception('no') }}", "{{ messages + 1 }}"])
def test_whatever_a_template_raises_is_one_line(tmp_path, monkeypatch, template):
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: the chat template cannot render these messages"):
        load(tmp_path, [{"prompt": "a"}], apply_chat_template=True)
