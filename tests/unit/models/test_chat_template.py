import pytest

from qwench.models.built_tokenizers import build_small_tokenizer

TOKENIZER = build_small_tokenizer()
USER = {"role": "user", "content": "q"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}
TURN = "<|im_start|>user\nq<|im_end|>\n"


def render(messages, **options) -> str:
    return TOKENIZER.apply_chat_template(messages, tokenize=False, **options)


def test_generation_prompt_opens_the_assistant_turn():
    assert render([USER], add_generation_prompt=True) == TURN + "<|im_start|>assistant\n"


def test_thinking_switched_off_closes_an_empty_think_block():
    rendered = render([USER], add_generation_prompt=True, enable_thinking=False)
    assert rendered == TURN + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert render([USER], add_generation_prompt=True, enable_thinking=True) == TURN + "<|im_start|>assistant\n"


def test_system_message_comes_first():
    assert render([{"role": "system", "content": "s"}, USER]) == "<|im_start|>system\ns<|im_end|>\n" + TURN


@pytest.mark.parametrize(
    "answer",
    [THOUGHT, {"role": "assistant", "content": "a", "reasoning_content": "hm"}],
    ids=["inline", "reasoning_content"],
)
def test_last_turn_keeps_its_thinking(answer):
    assert render([USER, answer]) == TURN + "<|im_start|>assistant\n<think>\nhm\n</think>\n\na<|im_end|>\n"


def test_last_turn_without_thinking_gets_an_empty_block():
    rendered = render([USER, {"role": "assistant", "content": "a"}])
    assert rendered == TURN + "<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>\n"


def test_earlier_turns_lose_their_thinking():
    rendered = render([USER, THOUGHT, USER, THOUGHT])
    first, last = "<|im_start|>assistant\na<|im_end|>\n", "<|im_start|>assistant\n<think>\nhm\n</think>\n\na<|im_end|>\n"
    assert rendered == TURN + first + TURN + last


def test_thinking_before_a_tool_response_is_kept():
    call = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    }
    rendered = render([USER, call, {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"}, THOUGHT])
    assert rendered == (
        TURN
        + '<|im_start|>assistant\n<think>\nhm\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        + "<|im_end|>\n<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        + "<|im_start|>assistant\n<think>\nhm\n</think>\n\na<|im_end|>\n"
    )


def test_tools_are_listed_in_a_system_turn_after_the_system_message():
    tools = [{"type": "function", "function": {"name": "add"}}]
    rendered = render([{"role": "system", "content": "s"}, USER], tools=tools)
    assert rendered == (
        "<|im_start|>system\ns\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "add"}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments "
        "within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' + TURN
    )
