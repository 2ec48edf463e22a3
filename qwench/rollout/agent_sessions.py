"""Agents of the user's that talk to the policy over an OpenAI endpoint, one session for each sample.

    agent --messages--> session: what is new is tokenised and masked, the policy's turn is sampled --message--> agent

A session is linear: each request repeats the conversation so far and adds to it. Sampled tokens are kept, never read again
from text.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from uuid import uuid4

from qwench.config.sections.agent import AgentConfig
from qwench.errors import ConfigError, QwenchError
from qwench.plugins import Function, guarded, load_object
from qwench.rollout.generate import GenerateContext
from qwench.rollout.tool_loop import MESSAGES, append_messages, parse_calls, show_messages, split_turns
from qwench.samples import Json, Message, Sample, Status

_FINISH = {Status.COMPLETED: "stop", Status.TRUNCATED: "length", Status.ABORTED: "abort"}
FLAG = "--custom-agent-function-path"


class RequestRefusedError(Exception):
    """An agent asked for what a session cannot do; it gets the message."""


class AgentSession:
    """The conversation of one sample."""

    def __init__(self, sample: Sample, context: GenerateContext, *, max_seq_len: int | None, template_kwargs: Json) -> None:
        self.sample = sample
        self.num_turns = 0
        self._context, self._max_seq_len, self._template_kwargs = context, max_seq_len, template_kwargs
        self._messages: list[Message] = []
        self._tools: Sequence[Json] | None = None
        self._one_at_a_time = asyncio.Lock()

    @property
    def messages(self) -> list[Message]:
        """Return the conversation so far."""
        return list(self._messages)

    async def answer(self, body: Mapping[str, Json]) -> Json:
        """Answer a chat completion.

        Raises:
            RequestRefusedError: the request does not go on from the conversation, or wants another sampling.
        """
        async with self._one_at_a_time:
            self._read(body)
            limit = body.get("max_completion_tokens") or body.get("max_tokens")
            room = None if self._max_seq_len is None else max(self._max_seq_len - len(self.sample.tokens), 0)
            limits = [value for value in (limit, room) if value is not None]
            if room == 0:
                self.sample.status = Status.TRUNCATED
                return self._completion({"role": "assistant", "content": ""}, "length")
            stop = body.get("stop") or ()
            turn = await self._context.generate(
                self.sample,
                max_new_tokens=min(limits) if limits else None,
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
            )
            self.num_turns += 1
            text = self._context.tokenizer.decode(list(turn.token_ids), skip_special_tokens=True)
            assert isinstance(text, str), "one list of ids decodes to one text"
            message, finish = _message(text, self._tools)
            self._messages.append(message)
            return self._completion(message, finish if turn.status is Status.COMPLETED else _FINISH[turn.status])

    def _read(self, body: Mapping[str, Json]) -> None:
        """Take in the messages that are new."""
        messages, known = body.get("messages"), len(self._messages)
        if not isinstance(messages, list) or not messages:
            raise RequestRefusedError("a chat completion needs a list of messages")
        self._check_sampling(body)
        if not self._messages:
            self._tools = body.get("tools")
            show_messages(
                self.sample,
                self._context.tokenizer,
                tools=self._tools,
                template_kwargs=self._template_kwargs,
                messages=messages,
            )
        else:
            if [_key(one) for one in messages[:known]] != [_key(one) for one in self._messages] or len(messages) == known:
                raise RequestRefusedError("a session is linear: repeat its messages unchanged, and add what is new")
            append_messages(
                self.sample, messages[known:], self._context, tools=self._tools, template_kwargs=self._template_kwargs
            )
        self._messages = list(messages)

    def _check_sampling(self, body: Mapping[str, Json]) -> None:
        sampling = self._context.sampling.whole
        for name, value in (("temperature", sampling.temperature), ("top_p", sampling.top_p), ("n", 1), ("stream", False)):
            if body.get(name) not in (None, value):
                raise RequestRefusedError(f"{name} of a session is {value}, got {body[name]}")

    def _completion(self, message: Message, finish: str) -> Json:
        prompt_tokens = len(self.sample.prompt.token_ids)
        return {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "policy",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": prompt_tokens, "total_tokens": len(self.sample.tokens)},
        }


OpenSession = Callable[[str, AgentSession], str]
"""(id, session) -> the base URL of its endpoint."""


class AgentRunner:
    """A `GenerateFunction`: runs the agent on each sample."""

    def __init__(
        self,
        agent: Function,
        section: AgentConfig,
        *,
        open_session: OpenSession,
        close: Callable[[str], None],
        template_kwargs: Json,
        records: bool,
    ) -> None:
        """Keep what every sample needs.

        Args:
            records: keep the messages in `Sample.metadata`.
        """
        self._agent, self._section, self._template_kwargs, self._records = agent, section, template_kwargs, records
        self._open, self._close = open_session, close

    async def generate(self, sample: Sample, context: GenerateContext) -> Sample | list[Sample]:
        """Run the agent, from the first message also where the sample was cut off; its record joins the metadata.

        Raises:
            QwenchError: the agent never asked the policy, or returned something else than a record.
        """
        sample.begin_again()
        session = AgentSession(sample, context, max_seq_len=self._section.max_seq_len, template_kwargs=self._template_kwargs)
        sampling, name = context.sampling.whole, uuid4().hex
        wanted = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
        try:
            record = await self._agent(
                base_url=self._open(name, session),
                prompt=sample.prompt.messages,
                request_kwargs=wanted,
                metadata=dict(sample.metadata),
            )
        finally:
            self._close(name)
        if record is not None and not isinstance(record, Mapping):
            raise QwenchError(f"{FLAG} must return a record or None, got {record!r:.200}.")
        if not session.num_turns and not context.requests.aborting:
            raise QwenchError(f"{FLAG}: the agent of sample {sample.sample_id} ended without a chat completion.")
        sample.metadata.update(record or {})
        if context.requests.aborting and sample.status is Status.PENDING:
            sample.status = Status.ABORTED
        if self._records:
            sample.metadata[MESSAGES] = session.messages
        return split_turns(sample, context) if self._section.generate_multi_samples else sample


def load_agent(section: AgentConfig) -> Function:
    """Load the user's agent.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = section.custom_agent_function_path
    assert path is not None, "AgentConfig.check_generate asks for it"
    called_as = "await fn(base_url=, prompt=, request_kwargs=, metadata=)"
    function = load_object(path, flag=FLAG)
    try:
        inspect.signature(function).bind(base_url="", prompt="", request_kwargs={}, metadata={})
    except TypeError as error:
        raise ConfigError(f"{FLAG} {path!r} ({error}) is called as {called_as}.") from error
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"{FLAG} {path!r} is not async; it is called as {called_as}.")
    return guarded(function, path=path, flag=FLAG)


def _message(text: str, tools: Sequence[Json] | None) -> tuple[Message, str]:
    before, calls = parse_calls(text) if tools else (text, [])
    if not calls:
        return {"role": "assistant", "content": text}, "stop"
    made = [
        {
            "id": f"call_{uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": _as_text(call.arguments)},
        }
        for call in calls
    ]
    return {"role": "assistant", "content": before, "tool_calls": made}, "tool_calls"


def _as_text(arguments: Json) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _key(message: Message) -> tuple[Json, Json, list[tuple[Json, Json]]]:
    """Return what must be the same in a repeated message."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    return message.get("role"), message.get("content") or "", calls
