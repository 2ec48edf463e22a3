"""Agents behind a session server, over HTTP."""

import asyncio
import re

import aiohttp
import pytest

from qwench.config.sections.agent import AgentConfig
from qwench.errors import ConfigError, QwenchError
from qwench.foreign.gateway import Gateway
from qwench.rollout.agent_sessions import AgentRunner, load_agent
from qwench.samples import Status
from tests.fakes.turns import ScriptedTurns, asked

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'


def play(agent, turns, *, sample=None, records=False, **flags):
    """Run an agent on one sample; return the sample and the engine."""
    engine, sample = ScriptedTurns(turns), sample or asked()

    async def run():
        gateway = Gateway(engine, engine.tokenizer, max_tokens=4096, agents_at=("127.0.0.1", 0))
        await gateway.open()
        runner = AgentRunner(
            agent,
            AgentConfig(**flags),
            open_session=gateway.open_session,
            close=gateway.close_session,
            template_kwargs=None,
            records=records,
        )
        try:
            return await runner.generate(sample, engine.context())
        finally:
            await gateway.close()

    return asyncio.run(run()), engine


async def ask(base_url, messages, **more):
    async with aiohttp.ClientSession() as client:
        answer = await client.post(f"{base_url}/v1/chat/completions", json={"messages": messages, **more})
        return answer.status, await answer.json()


async def two_turns(base_url, prompt, request_kwargs, metadata):
    _, first = await ask(base_url, prompt, tools=TOOLS, **request_kwargs)
    message = first["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert (first["choices"][0]["finish_reason"], call["function"]) == ("tool_calls", {"name": "add", "arguments": '{"a": 2}'})
    _, second = await ask(base_url, [*prompt, message, {"role": "tool", "content": "5", "tool_call_id": call["id"]}])
    return {"answer": second["choices"][0]["message"]["content"]}


def test_every_turn_of_a_session_may_be_a_sample_and_its_messages_are_recorded():
    (first, second), engine = play(two_turns, [CALL, "it is 5"], records=True, generate_multi_samples=True)
    assert [engine.tokenizer.decode(list(made.prompt.token_ids)) for made in (first, second)] == engine.prompts
    assert [made.response for made in (first, second)] == [f"{CALL}<|im_end|>", "it is 5<|im_end|>"]
    assert first.metadata["answer"] == second.metadata["answer"] == "it is 5"
    assert [message["role"] for message in second.metadata["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert second.metadata["messages"][-1] == {"role": "assistant", "content": "it is 5"}


def test_a_session_keeps_the_sampled_tokens_and_masks_what_the_agent_adds():
    made, engine = play(two_turns, [CALL, "it is 5"])
    first, second = engine.prompts
    assert second == (
        f"{first}{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    trained = [token for token, mask in zip(made.response_tokens, made.loss_mask, strict=True) if mask]
    assert engine.tokenizer.decode(trained) == f"{CALL}<|im_end|>it is 5<|im_end|>"
    assert made.metadata == {"answer": "it is 5"}


def test_an_agent_that_was_cut_off_begins_its_conversation_again():
    cut = asked()
    cut.append([5, 6, 7], log_probs=[-1.0, -1.0, -1.0], version=0)
    cut.status, cut.response = Status.ABORTED, "cut"
    again, _ = play(two_turns, [CALL, "it is 5"], sample=cut)
    fresh, _ = play(two_turns, [CALL, "it is 5"])
    assert again.to_record() == fresh.to_record()


async def rewrites(base_url, prompt, request_kwargs, metadata):
    _, first = await ask(base_url, prompt, tools=TOOLS)
    message = first["choices"][0]["message"]
    (call,) = message["tool_calls"]
    other_call = {**call, "function": {**call["function"], "arguments": '{"a": 3}'}}
    more, branches = {"role": "user", "content": "more"}, [{"role": "user", "content": "other"}, message]
    changed = [*prompt, {**message, "tool_calls": [other_call]}]
    asked = [(branches, {}), ([*branches, more], {}), ([*changed, more], {}), ([*prompt, message], {})]
    wanted = {"temperature": 0.5, "top_p": 0.5, "n": 2, "stream": True}
    asked += [([*prompt, message, more], {name: value}) for name, value in wanted.items()]
    answers = [await ask(base_url, messages, **more_words) for messages, more_words in asked]
    same = {"temperature": 1.0, "top_p": 1.0, "n": 1, "stream": False}
    assert (await ask(base_url, [*prompt, message, more], **same))[0] == 200
    return {"refused": [(status, answer["error"]["message"]) for status, answer in answers]}


def test_a_conversation_that_branches_and_another_sampling_are_refused():
    made, _ = play(rewrites, [CALL, "b"])
    linear = (400, "a session is linear: repeat its messages unchanged, and add what is new")
    wanted = {"temperature": (1.0, 0.5), "top_p": (1.0, 0.5), "n": (1, 2), "stream": (False, True)}
    others = [(400, f"{name} of a session is {own}, got {other}") for name, (own, other) in wanted.items()]
    assert made.metadata["refused"] == [linear] * 4 + others


async def keeps_all(base_url, prompt, request_kwargs, metadata):
    _, whole = await ask(base_url, prompt, tools=TOOLS)
    return {"whole": whole, "asked": [prompt, request_kwargs, metadata]}


def test_an_answer_is_a_chat_completion_and_an_agent_is_told_its_sampling_and_its_record():
    sample = asked()
    sample.metadata["level"] = 3
    made, _ = play(keeps_all, [f"think {CALL}"], sample=sample)
    whole, num_prompt = made.metadata["whole"], len(made.prompt.token_ids)
    identity, created = whole.pop("id"), whole.pop("created")
    (call,) = whole["choices"][0]["message"].pop("tool_calls")
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", identity) and isinstance(created, int)
    assert re.fullmatch("call_[0-9a-f]{24}", call.pop("id"))
    assert call == {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    assert whole == {
        "object": "chat.completion",
        "model": "policy",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "think "}, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": num_prompt, "total_tokens": num_prompt + len(made.response_tokens)},
    }
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 400}
    assert made.metadata["asked"] == [sample.prompt.messages, sampling, {"level": 3}]


async def asks_without_messages(base_url, prompt, request_kwargs, metadata):
    answers = [await ask(base_url, messages) for messages in (None, [], "2+3=")]
    return {"refused": [(status, answer["error"]["message"]) for status, answer in answers]}


def test_a_request_without_messages_is_refused_and_is_no_turn():
    with pytest.raises(QwenchError, match="ended without a chat completion"):
        play(asks_without_messages, ["a", "b", "c"])

    async def asks_rightly_after(base_url, prompt, request_kwargs, metadata):
        refused = await asks_without_messages(base_url, prompt, request_kwargs, metadata)
        await ask(base_url, prompt)
        return refused

    made, engine = play(asks_rightly_after, ["a"])
    assert made.metadata["refused"] == [(400, "a chat completion needs a list of messages")] * 3
    assert len(engine.requests) == 1


async def long_talk(base_url, prompt, request_kwargs, metadata):
    _, first = await ask(base_url, prompt)
    message = first["choices"][0]["message"]
    _, second = await ask(base_url, [*prompt, message, {"role": "user", "content": "more"}])
    return {"finish": second["choices"][0]["finish_reason"]}


def test_a_session_ends_at_its_bound():
    made, engine = play(long_talk, ["a", "b"], max_seq_len=24)
    assert made.metadata == {"finish": "length"}
    assert len(engine.requests) == 1 and engine.requests[0].sampling.max_new_tokens == 24 - len(made.prompt.token_ids)


async def wants_short_turns(base_url, prompt, request_kwargs, metadata):
    _, first = await ask(base_url, prompt, max_tokens=3, stop="x")
    more = [*prompt, first["choices"][0]["message"], {"role": "user", "content": "more"}]
    await ask(base_url, more, max_tokens=9, max_completion_tokens=2, stop=["y", "z"])
    return {"usage": first["usage"]}


def test_an_agent_may_bound_its_turns_and_name_stop_words():
    made, engine = play(wants_short_turns, ["a", "b"])
    assert [(one.sampling.max_new_tokens, one.sampling.stop) for one in engine.requests] == [(3, ("x",)), (2, ("y", "z"))]
    num_prompt = len(made.prompt.token_ids)
    assert made.metadata["usage"] == {"prompt_tokens": num_prompt, "total_tokens": num_prompt + 2}, "a and its end token"


async def says_nothing(base_url, prompt, request_kwargs, metadata):
    return None


def test_an_agent_that_never_asks_ends_the_run():
    with pytest.raises(QwenchError, match="ended without a chat completion"):
        play(says_nothing, [])


async def other_arguments(url):
    return url


@pytest.mark.parametrize(("name", "message"), [("other_arguments", "is called as await fn"), ("ScriptedTurns", "is called as")])
def test_an_agent_that_cannot_be_called_is_refused_at_the_start(name, message):
    with pytest.raises(ConfigError, match=message):
        load_agent(AgentConfig(custom_agent_function_path=f"{__name__}.{name}"))
    assert load_agent(AgentConfig(custom_agent_function_path=f"{__name__}.two_turns"))
