"""The built-in loop of tool calls."""

import asyncio
from dataclasses import replace

import pytest

from qwench.config.sections.agent import AGENT, TOOL_LOOP, AgentConfig
from qwench.errors import ConfigError, QwenchError
from qwench.rollout.tool_loop import MESSAGES, ToolCall, ToolLoop, append_messages, parse_calls, show_messages, split_turns
from qwench.samples import Status
from tests.fakes.turns import ScriptedTurns, asked

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
RAN: list[tuple[str, object]] = []


async def add(name, arguments):
    RAN.append((name, arguments))
    return str(arguments["a"] + arguments["b"])


def test_calls_are_json_objects_with_a_name():
    assert parse_calls(f"let me see {CALL}") == ("let me see ", [ToolCall(name="add", arguments={"a": 2, "b": 3})])
    assert parse_calls("<tool_call>{broken</tool_call>") == ("<tool_call>{broken</tool_call>", [])
    assert parse_calls("5") == ("5", [])


def test_outputs_of_tools_are_read_and_not_trained_on():
    RAN.clear()
    engine, sample = ScriptedTurns([CALL, "5"]), asked()
    loop = ToolLoop(tools=TOOLS, execute=add, max_turns=4, template_kwargs=None)
    made = asyncio.run(loop.generate(sample, engine.context()))
    assert RAN == [("add", {"a": 2, "b": 3})]
    first, second = engine.prompts
    assert '"name": "add"' in first and first.endswith("<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n")
    between = "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert second == f"{first}{CALL}<|im_end|>{between}"
    trained = [token for token, mask in zip(made.response_tokens, made.loss_mask, strict=True) if mask]
    assert engine.tokenizer.decode(trained) == f"{CALL}<|im_end|>5<|im_end|>"
    context = [token for token, mask in zip(made.response_tokens, made.loss_mask, strict=True) if not mask]
    assert engine.tokenizer.decode(context) == between
    assert (made.status, made.prompt.text) == (Status.COMPLETED, first)


def test_an_output_that_is_no_text_is_refused():
    async def number(name, arguments):
        return 5

    loop = ToolLoop(tools=TOOLS, execute=number, max_turns=4, template_kwargs=None)
    with pytest.raises(QwenchError, match="--generate-execute-tool-function-path must return text for add, got 5"):
        asyncio.run(loop.generate(asked(), ScriptedTurns([CALL]).context()))


def test_a_call_that_was_cut_off_in_the_middle_is_run_when_its_turn_goes_on():
    RAN.clear()
    engine, sample = ScriptedTurns([CALL, CALL[:20], CALL[20:], "5"]), asked()
    loop = ToolLoop(tools=TOOLS, execute=add, max_turns=4, template_kwargs=None)
    context = engine.context()
    show_messages(sample, engine.tokenizer, tools=TOOLS, template_kwargs=None)

    async def cut_off_then_go_on():
        await context.generate(sample)
        append_messages(sample, [{"role": "tool", "content": "5"}], context, tools=TOOLS, template_kwargs=None)
        half = engine.tokenizer.encode(CALL[:20], add_special_tokens=False)
        sample.append(half, log_probs=[-1.0] * len(half), version=3)
        sample.status = Status.ABORTED
        engine.skip_turn()
        return await loop.generate(sample, context)

    made = asyncio.run(cut_off_then_go_on())
    assert RAN == [("add", {"a": 2, "b": 3})]
    assert made.status is Status.COMPLETED and len(engine.prompts) == 3


@pytest.mark.parametrize(("messages", "said"), [([{"role": "critic", "content": "x"}], "critic"), ([{"content": "x"}], "role")])
def test_messages_that_cannot_be_shown_are_refused_by_their_place(messages, said):
    engine, sample = ScriptedTurns([]), asked()
    for place, named in ((None, f"sample {sample.sample_id}"), ("a.jsonl:3", "a.jsonl:3")):
        sample.prompt = replace(sample.prompt, place=place)
        with pytest.raises(ConfigError, match=f"^{named}: .*{said}"):
            show_messages(sample, engine.tokenizer, tools=None, template_kwargs=None, messages=messages)


def test_the_turns_before_a_cut_count():
    RAN.clear()
    engine, sample = ScriptedTurns([CALL, CALL]), asked()
    context = engine.context()
    show_messages(sample, engine.tokenizer, tools=TOOLS, template_kwargs=None)

    async def cut_off_then_go_on():
        await context.generate(sample)
        append_messages(sample, [{"role": "tool", "content": "5"}], context, tools=TOOLS, template_kwargs=None)
        sample.status = Status.ABORTED
        return await ToolLoop(tools=TOOLS, execute=add, max_turns=2, template_kwargs=None).generate(sample, context)

    asyncio.run(cut_off_then_go_on())
    assert RAN == [] and len(engine.prompts) == 2


def test_the_last_turn_runs_no_tool():
    RAN.clear()
    engine = ScriptedTurns([CALL, CALL, "never"])
    asyncio.run(ToolLoop(tools=TOOLS, execute=add, max_turns=2, template_kwargs=None).generate(asked(), engine.context()))
    assert len(RAN) == 1 and len(engine.prompts) == 2


def test_every_turn_may_be_a_sample_whose_prompt_is_all_before_it():
    loop = ToolLoop(tools=TOOLS, execute=add, max_turns=4, template_kwargs=None, splits=True)
    engine, whole_engine = ScriptedTurns([CALL, "5"]), ScriptedTurns([CALL, "5"])
    first, second = asyncio.run(loop.generate(asked(), engine.context()))
    one = ToolLoop(tools=TOOLS, execute=add, max_turns=4, template_kwargs=None)
    whole = asyncio.run(one.generate(asked(), whole_engine.context()))
    assert [engine.tokenizer.decode(list(made.prompt.token_ids)) for made in (first, second)] == engine.prompts
    assert [made.response for made in (first, second)] == [f"{CALL}<|im_end|>", "5<|im_end|>"]
    assert second.tokens == whole.tokens and first.tokens == whole.tokens[: len(first.tokens)]
    for made in (first, second):
        assert made.loss_mask == [1] * made.response_length
        assert (made.rollout_log_probs, made.weight_versions) == ([-1.0] * made.response_length, [3] * made.response_length)
        assert made.response_tokens == made.tokens[len(made.prompt.token_ids) :]
        assert made.status is Status.COMPLETED
    assert (first.input_tokens, second.input_tokens) == (0, whole.input_tokens)


def test_a_sample_that_will_go_on_is_not_divided():
    engine, sample = ScriptedTurns(["5"]), asked()
    sample.append([7, 8], log_probs=[-1.0, -1.0], version=3)
    sample.append([9], log_probs=None, version=3)
    sample.append([7], log_probs=[-1.0], version=3)
    sample.status = Status.ABORTED
    assert split_turns(sample, engine.context()) == [sample]


def test_the_conversation_is_kept_where_it_is_recorded():
    loop = ToolLoop(tools=TOOLS, execute=add, max_turns=4, template_kwargs=None, records=True)
    made = asyncio.run(loop.generate(asked(), ScriptedTurns([CALL, "5"]).context()))
    assert made.metadata[MESSAGES] == [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": CALL},
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "assistant", "content": "5"},
    ]


@pytest.mark.parametrize(("path", "flag"), [(TOOL_LOOP, "--generate-execute-tool"), (AGENT, "--custom-agent-function")])
def test_a_built_in_function_without_what_it_calls_is_refused(path, flag):
    with pytest.raises(ConfigError, match=rf"needs {flag}"):
        AgentConfig().check_generate(path)


def test_a_function_that_nothing_calls_is_refused():
    with pytest.raises(ConfigError, match=r"^--custom-agent-function-path has no effect without"):
        AgentConfig(custom_agent_function_path="a.b").check_generate(None)
    with pytest.raises(ConfigError, match=r"^--generate-multi-samples divides"):
        AgentConfig(generate_multi_samples=True).check_generate(None)
    AgentConfig(generate_multi_samples=True).check_generate("mine.generate")
    with pytest.raises(ConfigError, match=r"^--use-session-server serves"):
        AgentConfig(use_session_server=True).check_generate("mine.generate")


def test_flags_of_miles_load_the_loop():
    section = AgentConfig(
        generate_tool_specs_path=f"{__name__}.TOOLS",
        generate_execute_tool_function_path=f"{__name__}.add",
        generate_max_turns=3,
        generate_multi_samples=True,
    )
    engine = ScriptedTurns(["5"])
    (made,) = asyncio.run(ToolLoop.load(section, template_kwargs=None).generate(asked(), engine.context()))
    assert made.response == "5<|im_end|>" and '"name": "add"' in engine.prompts[0]
    with pytest.raises(ConfigError, match="must name a list of tool schemas"):
        ToolLoop.load(
            AgentConfig(generate_tool_specs_path=f"{__name__}.add", generate_execute_tool_function_path=f"{__name__}.add"),
            template_kwargs=None,
        )
