import json
from array import array

import pyarrow
import pyarrow.parquet
import pytest

from qwench.data.cursor import Draw
from qwench.data.sft import LoadedSft, SftExample, SftSource, describe_packing, load_sft, render_mask_preview
from qwench.errors import CheckpointError, ConfigError
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.samples import Prompt, Sample, Status

TOKENIZER = build_small_tokenizer()
PROMPT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def conversation(*answers: str, **fields) -> dict:
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": a, **fields}] for a in answers]
    return {"messages": [message for turn in turns for message in turn]}


def load(tmp_path, rows, **options) -> LoadedSft:
    if options.pop("parquet", False):
        path = tmp_path / "sft.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = tmp_path / "sft.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {
        "input_key": "messages",
        "flag": "--input-key",
        "tool_key": "tools",
        "tokenizer": TOKENIZER,
        "loss_mask_type": None,
        "apply_chat_template_kwargs": {"enable_thinking": False},
        "max_len": None,
    }
    return load_sft(str(path), **{**defaults, **options})


def source(loaded: LoadedSft, *, batch: int = 1, shuffle: bool = False) -> SftSource:
    return SftSource(loaded.examples, rollout_batch_size=batch, shuffle=shuffle, seed=42)


def first_sample(loaded: LoadedSft):
    return source(loaded).take(0).samples[0]


def test_response_is_what_is_trained_on(tmp_path):
    sample = first_sample(load(tmp_path, [conversation("12")], apply_chat_template_kwargs=None))
    assert sample.prompt.text == PROMPT
    assert TOKENIZER.decode(sample.prompt.token_ids) == PROMPT
    assert TOKENIZER.decode(sample.response_tokens) == "<think>\n\n</think>\n\n12<|im_end|>"
    assert sample.loss_mask == [1] * sample.response_length
    assert (sample.reward, sample.status) == (0.0, Status.COMPLETED)
    assert sample.rollout_log_probs == [0.0] * sample.response_length


def test_a_conversation_is_a_finished_sample():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    example = SftExample(tokens=array("i", [5, 6, 7, 8]), loss_mask=b"\1\0\1", prompt_text="q", messages=messages)
    assert example.to_sample(Draw(row=2, group_id=3, first_sample_id=9)) == Sample(
        prompt=Prompt(text="q", token_ids=(5,), messages=messages),
        sample_id=9,
        group_id=3,
        tokens=[5, 6, 7, 8],
        response_length=3,
        loss_mask=[1, 0, 1],
        rollout_log_probs=[0.0] * 3,
        weight_versions=[-1] * 3,
        status=Status.COMPLETED,
        reward=0.0,
    )


def test_turns_between_trained_ones_are_masked(tmp_path):
    sample = first_sample(load(tmp_path, [conversation("1", "2")]))
    pieces = list(zip(sample.response_tokens, sample.loss_mask, strict=True))
    # The empty think block is only in the last turn's generation prompt; the first turn is "1", its end marker, a newline.
    between = TOKENIZER.encode("\n" + PROMPT + "<think>\n\n</think>\n\n")
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    expected = [(ord("1"), 1), (end, 1), *[(token, 0) for token in between], (ord("2"), 1), (end, 1)]
    assert pieces == expected
    assert sample.tokens == [*sample.prompt.token_ids, *[token for token, _ in expected]]


def test_answer_is_tokenised_apart_from_the_prompt(tmp_path):
    # Together, the newline of "assistant\n" and the answer's own would be the one token "\n\n".
    sample = first_sample(load(tmp_path, [conversation("\nx")], loss_mask_type="distill_qwen", apply_chat_template_kwargs=None))
    assert TOKENIZER.convert_ids_to_tokens(sample.response_tokens) == ["\u010a", "x"]
    assert sample.prompt.token_ids[-1] == TOKENIZER.convert_tokens_to_ids("\u010a")


def test_long_and_untrained_conversations_are_dropped_and_counted(tmp_path):
    rows = [
        conversation("1"),
        conversation("1" * 100),
        conversation("1", step_loss_mask=0),
        {"messages": [{"role": "user", "content": "alone"}]},
    ]
    loaded = load(tmp_path, rows, max_len=60)
    assert (len(loaded.examples), loaded.num_too_long, loaded.num_untrained) == (1, 1, 2)


def test_limit_counts_all_tokens(tmp_path):
    length = len(first_sample(load(tmp_path, [conversation("123")])).tokens)
    assert len(load(tmp_path, [conversation("123")], max_len=length).examples) == 1
    with pytest.raises(ConfigError, match="1 longer than 16 tokens"):
        load(tmp_path, [conversation("123")], max_len=length - 1)


def test_missing_messages_name_the_line(tmp_path):
    with pytest.raises(ConfigError, match=r"sft\.jsonl:2: key 'messages' \(--input-key\) is missing; the row has: text"):
        load(tmp_path, [conversation("1"), {"text": "x"}])


def test_rollouts_are_single_sample_groups_over_epochs(tmp_path):
    loaded = load(tmp_path, [conversation(str(n)) for n in range(3)])
    rollouts = source(loaded, batch=2)
    first, second = rollouts.take(0), rollouts.take(1)
    assert (first.rollout_id, second.rollout_id) == (0, 1)
    assert [group.group_id for group in (*first.groups, *second.groups)] == [0, 1, 2, 3]
    assert [sample.sample_id for sample in second.samples] == [2, 3]
    assert [TOKENIZER.decode(sample.response_tokens)[0] for sample in (*first.samples, *second.samples)] == ["0", "1", "2", "0"]
    assert all(len(group.samples) == 1 for group in first.groups)
    assert rollouts.num_rollouts_per_epoch() == 1


def test_source_resumes_and_refuses_another_data_set(tmp_path):
    loaded = load(tmp_path, [conversation(str(n)) for n in range(5)])
    rollouts = source(loaded, batch=3, shuffle=True)
    rollouts.take(0)
    state = json.loads(json.dumps(rollouts.state_dict()))
    restored = source(loaded, batch=3, shuffle=True)
    restored.load_state_dict(state)
    assert restored.take(1) == rollouts.take(1)
    other = source(load(tmp_path, [conversation(str(n)) for n in range(1, 6)]))
    with pytest.raises(CheckpointError, match="data cursor"):
        other.load_state_dict(state)


def test_preview_marks_exactly_the_trained_tokens(tmp_path):
    sample = first_sample(load(tmp_path, [conversation("a [bold] \\[x] claim\\")]))
    preview = render_mask_preview(sample, TOKENIZER)
    answer = "a [bold] \\[x] claim\\<|im_end|>"
    assert preview.plain == TOKENIZER.decode(sample.tokens).replace(answer, f"[[{answer}]]")
    assert [(preview.plain[span.start : span.end], span.style) for span in preview.spans] == [
        (TOKENIZER.decode(sample.prompt.token_ids), "dim"),
        (f"[[{answer}]]", "bold green"),
    ]


def test_a_preview_shows_control_characters_and_does_not_send_them(tmp_path):
    sample = first_sample(load(tmp_path, [conversation("a\x1b[2Jb")]))
    assert "[[a\\x1b[2Jb<|im_end|>]]" in render_mask_preview(sample, TOKENIZER).plain


def test_long_preview_is_cut_and_says_so(tmp_path):
    sample = first_sample(load(tmp_path, [conversation("1" * 700)]))
    preview = render_mask_preview(sample, TOKENIZER, max_tokens=10)
    assert preview.plain == TOKENIZER.decode(sample.tokens[:10]) + f" ... ({len(sample.tokens) - 10} more tokens)"
    assert render_mask_preview(sample, TOKENIZER).plain.endswith(f"1]] ... ({len(sample.tokens) - 600} more tokens)")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "the answer"}]},
        {"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "the answer"}]},
        {"conversations": conversation("the answer")["messages"]},
        {"prompt": "q", "completion": "the answer"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "the answer"}]},
        {"instruction": "q", "input": "", "output": "the answer"},
        {"instruction": "q", "output": [{"no": "text"}], "messages": conversation("the answer")["messages"]},
    ],
)
def test_the_forms_of_conversations_train_on_the_same_answer(tmp_path, row):
    sample = first_sample(load(tmp_path, [row]))
    expected = first_sample(load(tmp_path, [conversation("the answer")]))
    assert (sample.tokens, sample.loss_mask) == (expected.tokens, expected.loss_mask)


@pytest.mark.parametrize("role", ["tool", "observation"])
def test_the_result_of_a_tool_is_one_in_the_form_of_sharegpt_too(tmp_path, role):
    said = [("human", "q"), ("gpt", "look"), (role, "7"), ("gpt", "the answer")]
    [example] = load(tmp_path, [{"conversations": [{"from": who, "value": text} for who, text in said]}]).examples
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]


def test_the_column_of_the_flag_decides_among_two_forms_of_conversation(tmp_path):
    row = {"conversations": "number 7", "prompt": "q", "completion": "the answer"}
    expected = first_sample(load(tmp_path, [conversation("the answer")]))
    assert first_sample(load(tmp_path, [row], input_key="prompt")).tokens == expected.tokens


def test_the_input_of_alpaca_follows_its_instruction(tmp_path):
    sample = first_sample(load(tmp_path, [{"instruction": "Add.", "input": "2+5", "output": "7"}]))
    assert "user\nAdd.\n\n2+5<|im_end|>" in sample.prompt.text


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": w, "value": v} for w, v in (("system", "Be brief."), ("human", "q"), ("gpt", "a"))]},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
    ],
    ids=["sharegpt", "sharegpt with its own", "completion", "alpaca"],
)
def test_the_column_of_instructions_is_the_system_message(tmp_path, row):
    sample = first_sample(load(tmp_path, [{**row, "system": "Be brief."}]))
    assert sample.prompt.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n")


def test_the_history_of_alpaca_is_told_before_its_instruction(tmp_path):
    row = {"instruction": "and 2+6?", "output": "8", "history": [["2+5?", "7"]]}
    sample = first_sample(load(tmp_path, [row]))
    turns = [("user", "2+5?"), ("assistant", "7"), ("user", "and 2+6?"), ("assistant", "8")]
    expected = first_sample(load(tmp_path, [{"messages": [{"role": role, "content": text} for role, text in turns]}]))
    assert (sample.tokens, sample.loss_mask) == (expected.tokens, expected.loss_mask)


def test_an_answer_of_weight_zero_is_not_trained_on(tmp_path):
    loaded = load(tmp_path, [conversation("1", weight=0), conversation("2", weight=1)])
    assert (len(loaded.examples), loaded.num_untrained) == (1, 1)
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "1", "weight": 0}]
    assert load(tmp_path, [{"conversations": said}, conversation("2")]).num_untrained == 1


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
            "the column 'system' and the first message are different instructions",
        ),
        ({"instruction": "q", "output": "7", "history": ["qa"]}, r"key 'history' must be a list of \[asked, answered\]"),
        ({"instruction": "q", "output": "7", "history": [["q"]]}, r"key 'history' must be a list of \[asked, answered\]"),
        ({"instruction": "q", "output": "7", "history": [["q", ""]]}, "a message of role 'assistant' is empty"),
        ({"conversations": [{"from": "bing", "value": "q"}]}, "`from` 'bing' is unknown; known: human"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, "content of a message must be text"),
        ({"prompt": "q", "completion": 7}, "messages must be text or a list of them"),
        ({"prompt": "q", "completion": ""}, "a message of role 'assistant' is empty"),
        ({"instruction": 1, "output": "7"}, "key 'instruction' must be text"),
        ({"instruction": "q", "input": 1, "output": "7"}, "key 'input' must be text"),
        ({"instruction": "q", "output": 7}, "key 'output' must be text"),
        ({"prompt": "q"}, r"key 'messages' \(--input-key\) is missing; the row has: prompt"),
        ({"messages": [{"from": "human", "value": "q"}, {"role": "user"}]}, "a message must be a record with `role`"),
        (
            conversation("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "the text of a call's arguments is not JSON",
        ),
        ({"question": "q", "answer": "7"}, r"key 'messages' \(--input-key\) is missing; the row has: question, answer"),
        (conversation(7), "must be text or text parts, got 7"),
        (conversation({"text": "seven"}), "must be text or text parts"),
        (conversation(None), "must be text or text parts, got null"),
        (conversation(""), "a message of role 'assistant' is empty"),
        ({"messages": [{"role": "human", "content": "q"}, {"role": "assistant", "content": "a"}]}, "role 'human' is not one"),
    ],
)
def test_a_conversation_that_would_train_on_nothing_is_refused_by_line(tmp_path, row, problem):
    with pytest.raises(ConfigError, match=rf"sft\.jsonl:2: .*{problem}"):
        load(tmp_path, [conversation("fine"), row])


def test_an_answer_in_text_parts_is_trained_whole(tmp_path):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "answer"}]
    assert (
        first_sample(load(tmp_path, [conversation(parts)])).tokens
        == first_sample(load(tmp_path, [conversation("the answer")])).tokens
    )


def test_a_mask_that_differs_from_the_template_names_the_rows(tmp_path):
    rows = [conversation("1"), conversation("1", "2"), conversation("3")]
    assert load(tmp_path, rows).differing == []
    assert load(tmp_path, rows, loss_mask_type="qwen3").differing == []  # the options of the template are those of both
    # qwen3 writes each turn as if it were the last, with an empty think block; the template has none in earlier turns.
    differing = load(tmp_path, rows, loss_mask_type="qwen3", apply_chat_template_kwargs=None).differing
    assert [place.rpartition(":")[2] for place in differing] == ["2"]


def test_a_template_of_which_no_mask_can_be_derived_differs_from_none(tmp_path):
    hiding = build_small_tokenizer()
    hiding.chat_template = "{% for m in messages %}{{ m.role }}{{ m.content if m.content | length < 9 else '' }}{% endfor %}"
    options = {"tokenizer": hiding, "loss_mask_type": "distill_qwen", "apply_chat_template_kwargs": None}
    assert load(tmp_path, [conversation("a long answer")], **options).differing == []


def test_packing_is_described_by_hand():
    def example(length: int, trained: int) -> SftExample:
        mask = bytes([1] * trained)
        return SftExample(tokens=array("i", range(length)), loss_mask=mask, prompt_text="", messages=())

    # Steps of two: 6 + 4 in one micro-batch of 10, then 6 and 8 in two.
    examples = [example(6, 3), example(4, 3), example(6, 3), example(8, 3)]
    assert describe_packing(examples, per_step=2, max_tokens=10, num_ranks=1) == (
        "4 conversations of 6 tokens, at most 8; 50% of the tokens are trained on; micro-batches are 80% full (1.5 a step)"
    )
    # Two ranks have as many micro-batches each: the first step is split.
    assert describe_packing(examples, per_step=2, max_tokens=10, num_ranks=2).endswith("micro-batches are 60% full (2 a step)")
    assert describe_packing(examples, per_step=2, max_tokens=None, num_ranks=1).endswith("50% of the tokens are trained on")
    # A hundred steps are tried.
    examples = [example(10, 5)] * 200 + [example(5, 5)] * 2
    assert describe_packing(examples, per_step=2, max_tokens=20, num_ranks=1).endswith("are 100% full (1 a step)")


def test_parquet_trains_on_the_tool_calls_of_jsonl(tmp_path):
    # The common schema of the two rows gives each call the other's arguments, as nulls.
    calls = [{"name": "mul", "arguments": {"x": 6, "y": 7}}, {"name": "clock", "arguments": {"zone": "UTC"}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            ]
        }
        for call in calls
    ]
    from_parquet = load(tmp_path, rows, parquet=True)
    assert from_parquet.examples == load(tmp_path, rows).examples
    trained = [TOKENIZER.decode(sample.response_tokens) for sample in source(from_parquet, batch=2).take(0).samples]
    assert '"arguments": {"x": 6, "y": 7}}' in trained[0]
    assert '"arguments": {"zone": "UTC"}}' in trained[1]


def test_without_a_limit_no_limit_is_spoken_of(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, [conversation("1", step_loss_mask=0)])
    assert str(caught.value) == (
        f"no conversation of {tmp_path / 'sft.jsonl'} can be trained on: 1 without an assistant turn to "
        "learn from; give others."
    )
