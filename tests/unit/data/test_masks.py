import pytest

from qwench.data.masks import build_mask_function
from qwench.errors import ConfigError
from qwench.models.built_tokenizers import build_small_tokenizer

TOKENIZER = build_small_tokenizer()
ASSISTANT = "<|im_start|>assistant\n"

# ChatML as Qwen2.5 and SmolLM2 have it: a system message of its own unless the conversation brings one.
CHATML = build_small_tokenizer()
CHATML.chat_template = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe nice<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# No generation prompt to speak of, no end marker, whitespace trimmed by the template.
PLAIN = build_small_tokenizer()
PLAIN.chat_template = "{% for m in messages %}{{ m.role | upper }}: {{ m.content | trim }}\n{% endfor %}"

# A generation prompt that opens the think block, as that of Qwen3's thinking models.
THINKING = build_small_tokenizer()
_START = THINKING.chat_template.index("{%- if add_generation_prompt %}")
THINKING.chat_template = (
    THINKING.chat_template[:_START] + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
CALL = {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


def segments(kind, messages, *, tokenizer=TOKENIZER, tools=None, **template_kwargs):
    return build_mask_function(kind, tokenizer, template_kwargs=template_kwargs)(messages, tools, "here")


def text(found) -> str:
    return "".join(segment.text for segment in found)


def trained(found) -> list[str]:
    return [segment.text for segment in found if segment.trained and segment.text]


def test_derived_mask_trains_from_the_generation_prompt_through_the_end_marker():
    messages = [user("2+2?"), assistant("<think>\neasy\n</think>\n\n4")]
    found = segments(None, messages)
    assert text(found) == TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert trained(found) == ["<think>\neasy\n</think>\n\n4<|im_end|>"]
    assert found[0].text == "<|im_start|>user\n2+2?<|im_end|>\n" + ASSISTANT


def test_derived_mask_trains_on_the_empty_think_block_the_template_writes():
    assert trained(segments(None, [user("q"), assistant("a")])) == ["<think>\n\n</think>\n\na<|im_end|>"]


def test_derived_mask_leaves_out_what_the_generation_prompt_already_says():
    found = segments(None, [user("q"), assistant("a")], enable_thinking=False)
    assert trained(found) == ["a<|im_end|>"]


def test_derived_mask_starts_behind_the_think_block_that_the_generation_prompt_opens():
    messages = [
        user("q"),
        assistant("", reasoning_content="I need the tool", **CALL),
        {"role": "tool", "content": "3"},
        assistant("3", reasoning_content="done"),
    ]
    found = segments(None, messages, tokenizer=THINKING)
    assert text(found) == THINKING.apply_chat_template(messages, tokenize=False)
    assert trained(found) == [f"I need the tool\n</think>\n\n{CALLED}", "done\n</think>\n\n3<|im_end|>"]


def test_derived_mask_starts_behind_the_generation_prompt_of_a_conversation_that_the_policy_begins():
    block = build_small_tokenizer()
    block.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = segments(None, [assistant("a"), user("q"), assistant("b")], tokenizer=block)
    assert trained(found) == ["<think></think>a<|im_end|>", "<think></think>b<|im_end|>"]


def test_derived_mask_finds_a_generation_prompt_that_differs_from_its_second_letter_on():
    short = build_small_tokenizer()
    short.chat_template = (
        "{% for m in messages %}{{ '>' if m.role == 'assistant' else '<' }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}><think>{% endif %}"
    )
    assert trained(segments(None, [user("q"), assistant("<think>x</think>a")], tokenizer=short)) == ["x</think>a"]


def test_derived_mask_trains_a_turn_without_thinking_as_it_is():
    messages = [user("q"), assistant("<think>\none\n</think>\n\n<a>"), user("r"), assistant("<think>\ntwo\n</think>\n\nb")]
    assert trained(segments(None, messages, tokenizer=THINKING)) == ["<a><|im_end|>", "two\n</think>\n\nb<|im_end|>"]


@pytest.mark.parametrize("kind", ["qwen", "qwen3"])
def test_messages_that_do_not_begin_as_the_generation_prompt_keep_their_beginning(kind):
    bare = build_small_tokenizer()
    bare.chat_template = CHATML.chat_template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    found = segments(kind, [user("q"), assistant("<tea> 42"), user("r"), assistant("<think>\nx\n</think>\n4")], tokenizer=bare)
    assert trained(found) == ["<tea> 42<|im_end|>\n", "x\n</think>\n4<|im_end|>\n"]
    closed = segments("qwen3", [user("q"), assistant("<think>\nwell\n</think>\n\n42")], enable_thinking=False)
    assert trained(closed) == ["well\n</think>\n\n42<|im_end|>\n"]


def test_derived_mask_follows_the_template_in_dropping_earlier_thinking():
    messages = [user("q"), assistant("<think>\none\n</think>\n\na"), user("r"), assistant("<think>\ntwo\n</think>\n\nb")]
    found = segments(None, messages)
    assert text(found) == TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert trained(found) == ["a<|im_end|>", "<think>\ntwo\n</think>\n\nb<|im_end|>"]


def test_derived_mask_trains_on_tool_calls_and_not_on_tool_responses():
    call = assistant("", tool_calls=[{"function": {"name": "add", "arguments": {"a": 1}}}])
    tools = [{"type": "function", "function": {"name": "add"}}]
    found = segments(None, [user("q"), call, {"role": "tool", "content": "3"}, assistant("3")], tools=tools)
    assert trained(found) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\n3<|im_end|>",
    ]
    assert "# Tools" in found[0].text


@pytest.mark.parametrize("kind", [None, "qwen", "qwen3"])
def test_step_loss_mask_skips_a_message(kind):
    messages = [user("q"), assistant("a", step_loss_mask=0), user("r"), assistant("b", step_loss_mask=1)]
    (only,) = trained(segments(kind, messages))
    assert only.split("<|im_end|>")[0].endswith("b")


def test_equal_answers_in_a_row_are_told_apart():
    messages = [user("q"), assistant("same"), user("q"), assistant("same"), user("q"), assistant("same")]
    assert trained(segments(None, messages, tokenizer=CHATML)) == ["same<|im_end|>"] * 3


def test_user_text_that_looks_like_an_answer_is_not_trained():
    found = segments(None, [user(ASSISTANT + "a<|im_end|>"), assistant("a")], tokenizer=CHATML)
    assert trained(found) == ["a<|im_end|>"]
    assert found[0].text.endswith("a<|im_end|><|im_end|>\n" + ASSISTANT)


def test_template_without_prompt_and_marker_trains_on_the_answer():
    messages = [user("q"), assistant(" a "), user("r")]
    found = segments(None, messages, tokenizer=PLAIN)
    assert text(found) == "USER: q\nASSISTANT: a\nUSER: r\n"
    assert trained(found) == ["a"]


def test_the_longest_end_marker_is_trained_and_a_token_that_is_no_marker_is_not():
    marked = build_small_tokenizer()
    marked.add_special_tokens({"additional_special_tokens": ["<end>>", "<end>"]})
    marked.add_tokens(["<note>"])
    for after, learned in (("<end>>", "a<end>>"), ("<note><end>", "a")):
        marked.chat_template = f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}}{after}{{% endfor %}}"
        assert trained(segments(None, [user("q"), assistant("a")], tokenizer=marked)) == [learned]


def test_an_answer_behind_which_the_template_writes_nothing_is_trained_to_its_end():
    bare = build_small_tokenizer()
    bare.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    assert trained(segments(None, [user("q"), assistant("12"), user("r"), assistant("3")], tokenizer=bare)) == ["12", "3"]


def test_template_that_hides_the_answer_is_refused():
    tokenizer = build_small_tokenizer()
    short = "{{ m.content if m.content | length < 9 else '' }}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}" + short + "{% endfor %}"
    with pytest.raises(ConfigError, match="here: no loss mask can be derived"):
        segments(None, [user("q"), assistant("a long answer")], tokenizer=tokenizer)


def test_qwen_renders_each_message_alone_and_strips_the_default_system_message():
    found = segments("qwen", [user("q"), assistant("a"), user("r"), assistant("b")], tokenizer=CHATML)
    assert text(found) == (
        "<|im_start|>system\nBe nice<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    assert trained(found) == ["a<|im_end|>\n", "b<|im_end|>\n"]


def test_qwen3_keeps_the_thinking_of_every_turn():
    thought = "<think>\none\n</think>\n\na"
    system = {"role": "system", "content": "s"}
    found = segments("qwen3", [system, user("q"), assistant(thought), user("r"), assistant("b")])
    assert text(found) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        f"{ASSISTANT}{thought}<|im_end|>\n<|im_start|>user\nr<|im_end|>\n{ASSISTANT}<think>\n\n</think>\n\nb<|im_end|>\n"
    )
    assert trained(found) == [f"{thought}<|im_end|>\n", "<think>\n\n</think>\n\nb<|im_end|>\n"]


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("qwen3", "<think>\n\n</think>\n\na<|im_end|>\n"),
        ("qwen", "a<|im_end|>\n"),
        ("distill_qwen", "a"),
    ],
)
def test_tools_are_listed_once(kind, answer):
    tools = [{"type": "function", "function": {"name": "add"}}]
    found = segments(kind, [user("q"), assistant("a")], tools=tools)
    assert text(found).count("# Tools") == 1
    assert text(found).endswith(f"<|im_start|>user\nq<|im_end|>\n{ASSISTANT}{answer}")


@pytest.mark.parametrize(
    ("kind", "before"), [(None, 0), ("qwen", 0), ("qwen", 1), ("qwen3", 0), ("qwen3", 1), ("distill_qwen", 0)]
)
def test_a_message_that_is_not_written_is_refused_by_its_row(kind, before):
    with pytest.raises(ConfigError, match=r"^here: role 'human' is not one"):
        segments(kind, [user("q")] * before + [{"role": "human", "content": "q"}, assistant("a")])


def test_qwen3_writes_tool_results_in_a_row_into_one_turn_and_qwen_each_into_its_own():
    call = assistant("", tool_calls=[{"function": {"name": "add", "arguments": {"a": 1}}}] * 2)
    results = [{"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}]
    messages = [user("q"), call, *results, assistant("7")]
    one_turn = "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
    assert text(segments("qwen3", messages)).count("<tool_response>") == 2
    assert one_turn in text(segments("qwen3", messages))
    assert trained(segments("qwen3", messages))[-1] == "<think>\n\n</think>\n\n7<|im_end|>\n"
    assert one_turn not in text(segments("qwen", messages))


def test_distill_trains_on_the_bare_last_content():
    found = segments("distill_qwen", [user("q"), assistant("a")])
    assert [(segment.text, segment.trained) for segment in found] == [
        (f"<|im_start|>user\nq<|im_end|>\n{ASSISTANT}", False),
        ("a", True),
    ]
    found = segments("distill_qwen", [user("q"), assistant("a"), user("r"), assistant("b", step_loss_mask=0)])
    assert [(segment.text, segment.trained) for segment in found[1:]] == [("b", False)]


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "a"}]])
def test_distill_needs_text(content):
    with pytest.raises(ConfigError, match="--loss-mask-type distill_qwen needs text as the last message's content"):
        segments("distill_qwen", [user("q"), {"role": "assistant", "content": content}])


def test_qwen_means_distill_for_a_distilled_tokenizer():
    tokenizer = build_small_tokenizer()
    tokenizer.add_tokens(["<\uff5cAssistant\uff5c>"])
    messages = [user("q"), assistant("a")]
    assert segments("qwen", messages, tokenizer=tokenizer) == segments("distill_qwen", messages)


def test_unknown_mask_type_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"--loss-mask-type 'qwen3_5'; known: qwen, qwen3, distill_qwen"):
        build_mask_function("qwen3_5", TOKENIZER)
