import json

import pyarrow
import pyarrow.parquet
import pytest

from qwench.data.prompts import LoadedPrompts, NoPrompts, PromptSource, load_prompts
from qwench.errors import CheckpointError, ConfigError
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.samples import Prompt, Status

TOKENIZER = build_small_tokenizer()


def load(tmp_path, rows, **options) -> LoadedPrompts:
    if options.pop("parquet", False):
        path = tmp_path / "data.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif (path := options.pop("path", None)) is None:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {
        "input_key": "prompt",
        "label_key": None,
        "metadata_key": "metadata",
        "tool_key": "tools",
        "tokenizer": TOKENIZER,
        "apply_chat_template": False,
        "apply_chat_template_kwargs": None,
        "max_prompt_len": None,
    }
    return load_prompts(str(path), **{**defaults, **options})


def load_one(tmp_path, row, **options) -> Prompt:
    (prompt,) = load(tmp_path, [row], **options).prompts
    return prompt


def test_plain_text_is_tokenised_as_it_is(tmp_path):
    prompt = load_one(tmp_path, {"prompt": "1+1="})
    assert prompt.text == "1+1="
    assert prompt.token_ids == tuple(b"1+1=")
    assert prompt.label is None


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), ([{"role": "user", "content": "hé"}], '[{"role": "user", "content": "hé"}]')]
)
def test_a_function_of_the_users_gets_a_prompt_of_any_type(tmp_path, value, text):
    prompt = load_one(tmp_path, {"prompt": value}, as_given=True)
    assert (prompt.messages, prompt.text) == (value, text)
    with pytest.raises(ConfigError, match="is not text"):
        load_one(tmp_path, {"prompt": value})


@pytest.mark.parametrize("value", ["2+2?", [{"role": "user", "content": "2+2?"}]], ids=["text", "messages"])
def test_chat_template_renders_text_as_one_user_message(tmp_path, value):
    prompt = load_one(tmp_path, {"prompt": value}, apply_chat_template=True)
    assert prompt.text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(prompt.token_ids) == prompt.text
    assert prompt.token_ids[0] == TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    assert prompt.messages == value


def test_template_options_reach_the_template(tmp_path):
    prompt = load_one(
        tmp_path, {"prompt": "hi"}, apply_chat_template=True, apply_chat_template_kwargs={"enable_thinking": False}
    )
    assert prompt.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_tools_reach_the_template_as_records_or_json_text(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    as_records = load_one(tmp_path, {"prompt": "hi", "tools": tools}, apply_chat_template=True)
    as_text = load_one(tmp_path, {"prompt": "hi", "tools": json.dumps(tools)}, apply_chat_template=True)
    assert '{"type": "function", "function": {"name": "add"}}' in as_records.text
    assert as_records == as_text
    assert as_records.tools == tools


@pytest.mark.parametrize(
    ("label", "text"),
    [("34", "34"), (34, "34"), (34.5, "34.5"), (12345678901234567891, "12345678901234567891"), (["a", "b"], '["a", "b"]')],
)
def test_labels_become_text(tmp_path, label, text):
    assert load_one(tmp_path, {"prompt": "x", "label": label}, label_key="label").label == text


def test_null_label_is_none_unless_the_reward_needs_it(tmp_path):
    row = {"prompt": "x", "label": None}
    assert load_one(tmp_path, row, label_key="label").label is None
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: key 'label' \(--label-key\) is null"):
        load(tmp_path, [row], label_key="label", require_label=True)


def test_reward_that_needs_labels_needs_a_label_key(tmp_path):
    with pytest.raises(ConfigError, match="--label-key"):
        load(tmp_path, [{"prompt": "x"}], require_label=True)


def test_missing_keys_name_file_line_key_and_what_there_is(tmp_path):
    rows = [{"prompt": "x", "label": "1"}, {"question": "y", "answer": "2"}]
    with pytest.raises(ConfigError, match=r"data\.jsonl:2: key 'prompt' \(--input-key\) is missing; .*: question, answer"):
        load(tmp_path, rows)
    rows[1] = {"prompt": "y"}
    with pytest.raises(ConfigError, match=r"data\.jsonl:2: key 'label' \(--label-key\) is missing; the row has: prompt"):
        load(tmp_path, rows, label_key="label")


def test_prompts_over_the_limit_are_dropped_and_counted(tmp_path):
    loaded = load(tmp_path, [{"prompt": "12345"}, {"prompt": "123456"}, {"prompt": "1"}], max_prompt_len=5)
    assert [prompt.text for prompt in loaded.prompts] == ["12345", "1"]
    assert loaded.num_dropped == 1


def test_a_limit_that_drops_everything_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"all 2 .* of 3 tokens \(the shortest has 4\): .* of --rollout-max-prompt-len .*-kv-"
    ):
        load(tmp_path, [{"prompt": "1234"}, {"prompt": "12345"}], max_prompt_len=3)


def test_messages_without_the_template_flag_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: .*--apply-chat-template"):
        load(tmp_path, [{"prompt": [{"role": "user", "content": "x"}]}])


@pytest.mark.parametrize("value", [3, [], [{"content": "no role"}], ["text"]])
def test_malformed_messages_are_refused_by_line(tmp_path, value):
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: "):
        load(tmp_path, [{"prompt": value}], apply_chat_template=True)


def test_a_call_that_the_template_cannot_render_is_refused_by_line(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: a tool call must name its function"):
        calls = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [1]}, {"role": "user", "content": "y"}]
        load(tmp_path, [{"prompt": calls}], apply_chat_template=True)


def test_a_pass_rate_is_read_from_0_to_1_and_null_is_not_known(tmp_path):
    rows = [{"prompt": "a", "rate": rate} for rate in (0, 1, 0.5, None)]
    found = load(tmp_path, rows, pass_rate_key="rate").prompts
    assert [prompt.pass_rate for prompt in found] == [0.0, 1.0, 0.5, None]
    for rate in (-0.1, 1.1, True, "0.5"):
        with pytest.raises(ConfigError, match=rf"data\.jsonl:1: 'rate' is {rate!r}, and --curriculum-key names a pass rate"):
            load(tmp_path, [{"prompt": "a", "rate": rate}], pass_rate_key="rate")
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: key 'rate' \(--curriculum-key\) is missing"):
        load(tmp_path, [{"prompt": "a"}], pass_rate_key="rate")


def test_a_run_without_prompts_has_none_to_give():
    source = NoPrompts()
    assert source.next_groups(0) == [] and source.num_rollouts_per_epoch(8) == 1 and source.state_dict() == {}
    with pytest.raises(ConfigError, match=r"^--disable-rollout-global-dataset: the rollout function asked for 2 prompts"):
        source.next_groups(2)


def test_overrides_replace_entries_of_every_prompts_metadata(tmp_path):
    rows = [{"prompt": "a", "metadata": {"rm_type": "dapo", "level": 3}}, {"prompt": "b"}]
    loaded = load(tmp_path, rows).with_metadata({"rm_type": "math"})
    assert [prompt.metadata for prompt in loaded.prompts] == [{"rm_type": "math", "level": 3}, {"rm_type": "math"}]


def make_source(texts, *, n: int = 2) -> PromptSource:
    prompts = [Prompt(text=text, token_ids=tuple(text.encode()), metadata={"rm_type": "math"}) for text in texts]
    return PromptSource(prompts, n_samples_per_prompt=n, shuffle=False, seed=0)


def test_groups_hold_pending_siblings_with_run_wide_ids():
    source = make_source(["a", "b"], n=3)
    groups = source.next_groups(2) + source.next_groups(1)
    assert [group.group_id for group in groups] == [0, 1, 2]
    assert [[sample.sample_id for sample in group.samples] for group in groups] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [group.samples[0].prompt.text for group in groups] == ["a", "b", "a"]
    assert {sample.group_id for sample in groups[1].samples} == {1}
    sample = groups[1].samples[0]
    assert (sample.tokens, sample.response_length, sample.status) == ([ord("b")], 0, Status.PENDING)


@pytest.mark.parametrize(("num_groups", "num_rollouts"), [(1, 5), (2, 2), (5, 1), (8, 1)])
def test_an_epoch_holds_whole_rollouts_and_at_least_one(num_groups, num_rollouts):
    assert make_source("abcde").num_rollouts_per_epoch(num_groups) == num_rollouts


def test_siblings_do_not_share_mutable_metadata():
    (group,) = make_source(["a"]).next_groups(1)
    group.samples[0].metadata["turn"] = 1
    assert group.samples[1].metadata == {"rm_type": "math"}


def test_source_resumes_and_refuses_another_data_set():
    source = make_source(["a", "b", "c"])
    source.next_groups(2)
    state = json.loads(json.dumps(source.state_dict()))
    restored = make_source(["a", "b", "c"])
    restored.load_state_dict(state)
    assert restored.next_groups(3) == source.next_groups(3)
    with pytest.raises(
        CheckpointError, match=r"other prompts \(3 then, 3 now\); resume with the same data, keys, chat template"
    ):
        make_source(["a", "b", "x"]).load_state_dict(state)


USER = {"role": "user", "content": "y"}


def _called(call):
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize("tools", [[1], ["f"], '["f"]', [[]], [{}, 1]])
def test_tools_that_are_no_records_are_refused_by_line(tmp_path, tools):
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: tools must be a list of records"):
        load(tmp_path, [{"prompt": "a", "tools": tools}], apply_chat_template=True)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "user", "content": 3.5}], "must be text or text parts, got 3.5"),
        ([{"role": "user", "content": None}], "must be text or text parts, got null"),
        ([{"role": "user", "content": False}], "must be text or text parts, got False"),
        ([{"role": "user", "content": {"text": "hi"}}], "must be text or text parts"),
        ([{"role": "user", "content": ["hi"]}], "must be text or text parts"),
        ([{"role": "user", "content": [{"text": "hi"}, "x"]}], "must be text or text parts"),
        ([{"role": "user", "content": [{"text": "hi"}, {"type": "x"}]}], "must be text or text parts"),
        ([{"role": "user", "content": [{"type": "refusal", "text": "hi"}]}], "must be text or text parts"),
        ([{"role": "user", "content": []}], "must be text or text parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}]}], "must be text or text parts"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "must be text or text parts"),
        ([{"role": "user", "content": " \n"}], "a message of role 'user' is empty"),
        ([{"role": "user"}], "a message says nothing"),
        ([{"role": "user", "content": None, "tool_calls": None}], "a message says nothing"),
        ([{"role": "user", "content": None, "tool_calls": []}], "a message says nothing"),
        (
            [{"role": "user", "content": "hi", "tool_calls": [{"name": "f", "arguments": {}}]}],
            "'user' has tool_calls, which only",
        ),
        ([{"role": "user", "content": "hi", "reasoning_content": "hm"}], "'user' has reasoning_content, which only"),
        ([_called("f")], "a tool call must name its function"),
        ([_called([])], "a tool call must name its function"),
        ([_called({"function": {"arguments": {}}})], "a tool call must name its function"),
        ([_called({"function": {"name": "f"}})], "the arguments of a tool call must be a record or its JSON text"),
        ([_called({"function": {"name": "f", "arguments": [1]}})], "the arguments of a tool call must be a record"),
        ([_called({"function": {"name": "f", "arguments": '{"a": 1'}}), USER], "the text of a call's arguments is not JSON"),
        ([_called({"name": "f", "arguments": ""}), USER], "the text of a call's arguments is not JSON"),
        ([_called({"name": "f", "arguments": '"{}"'}), USER], "the arguments of a tool call must be a record or its JSON text"),
        ([{"role": "assistant", "content": "", "tool_calls": "f()"}], "tool_calls must be a list of records"),
        ([{"role": "assistant", "content": "a", "reasoning_content": ["hm"]}], "reasoning_content must be text"),
        ([{"role": "user", "content": "hi", "number": 10**30}], "cannot be recorded"),
        ([{"role": "human", "content": "hi"}], "role 'human' is not one that the chat template writes"),
        ([{"role": "User", "content": "hi"}], "role 'User' is not one that the chat template writes"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is"}], "ends with an assistant turn"),
        ([{"role": "user", "content": "\u200b\ufeff "}], "a message of role 'user' is empty"),
        ([{"role": "system", "content": ""}], "no message of the conversation says anything"),
        ([{"role": "tool", "content": [{"type": "text", "text": " "}]}], "no message of the conversation says anything"),
        *(
            ([{"role": "user", "content": "hi", name: ["a"]}], f"a message has {name}, which does not reach the model")
            for name in ("image", "images", "video", "videos", "video_url", "audio", "audios", "input_audio", "file")
        ),
        ([{"role": "user", "content": [{"text": "hi", "image_url": "a.png"}]}], "a message has image_url, which does not"),
        (
            [{"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": "{}"}}],
            "a message has function_call, which does not reach the model: only text and tool_calls do; remove it",
        ),
    ],
)
def test_what_would_not_reach_the_model_is_refused_by_line(tmp_path, messages, problem):
    rows = [{"prompt": [{"role": "user", "content": "fine"}]}, {"prompt": messages}]
    with pytest.raises(ConfigError, match=rf"data\.jsonl:2: .*{problem}"):
        load(tmp_path, rows, apply_chat_template=True)


@pytest.mark.parametrize(
    "member",
    ["image", "images", "image_url", "video", "videos", "video_url", "audio", "audios", "input_audio", "file", "function_call"],
)
def test_a_member_that_no_template_writes_is_refused_in_a_message_and_in_a_part(tmp_path, member):
    said = rf"data\.jsonl:1: a message has {member}, which does not reach the model"
    for message in ({"content": "hi", member: "x"}, {"content": [{"type": "text", "text": "hi", member: "x"}]}):
        with pytest.raises(ConfigError, match=said):
            load(tmp_path, [{"prompt": [{"role": "user", **message}]}], apply_chat_template=True)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_empty_system_message_and_a_tool_that_returned_nothing_are_kept(tmp_path, content):
    call = {"role": "assistant", **content, "tool_calls": [{"name": "f", "arguments": {}}]}
    thought = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    messages = [{"role": "system", "content": ""}, USER, call, {"role": "tool", "content": ""}, thought, USER]
    text = load_one(tmp_path, {"prompt": messages}, apply_chat_template=True).text
    assert text.index('{"name": "f", "arguments": {}}') < text.index("<tool_response>\n\n</tool_response>")


def test_members_that_say_nothing_are_no_part_of_a_message(tmp_path):
    message = {"role": "user", "content": [{"type": "text", "text": "hi", "image": None}], "images": [], "function_call": None}
    prompt = load_one(tmp_path, {"prompt": [message]}, apply_chat_template=True)
    assert prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_that_is_no_text_is_refused_by_line(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.jsonl:1 holds a NUL character"):
        load(tmp_path, [{"prompt": "a\0"}])


@pytest.mark.parametrize("prompt", ["", "   \n", "\u200b", "\ufeff\u2060"])
def test_an_empty_prompt_is_refused_by_line(tmp_path, prompt):
    with pytest.raises(ConfigError, match=r"data\.jsonl:3: the prompt is empty"):
        load(tmp_path, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": prompt}])


def test_a_prompt_knows_its_row(tmp_path):
    assert [prompt.place.rsplit("/")[-1] for prompt in load(tmp_path, [{"prompt": "a"}, {"prompt": "b"}]).prompts] == [
        "data.jsonl:1",
        "data.jsonl:2",
    ]


def test_another_data_set_of_equal_ends_is_told_apart(tmp_path):
    def position(middle: str) -> dict:
        prompts = load(tmp_path, [{"prompt": "a"}, {"prompt": middle}, {"prompt": "z"}]).prompts
        return PromptSource(prompts, n_samples_per_prompt=1, shuffle=False, seed=0).state_dict()

    assert position("m") == position("m")
    assert position("m") != position("n")


def test_parquet_gives_the_prompts_and_metadata_of_jsonl(tmp_path):
    # The common schema of the two rows gives each the other's keys, as nulls.
    parameters = [{"x": {"type": "integer"}}, {"city": {"type": "string", "description": "where"}}]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{n}"}],
            "tools": [{"type": "function", "function": {"name": f"f{n}", "parameters": {"properties": parameters[n]}}}],
            "metadata": [{"level": 1}, {"level": 2, "source": "book"}][n],
        }
        for n in range(2)
    ]
    from_parquet = load(tmp_path, rows, apply_chat_template=True, parquet=True).prompts
    assert from_parquet == load(tmp_path, rows, apply_chat_template=True).prompts
    assert ["null" in prompt.text for prompt in from_parquet] == [False, False]
    assert [prompt.metadata for prompt in from_parquet] == [{"level": 1}, {"level": 2, "source": "book"}]
