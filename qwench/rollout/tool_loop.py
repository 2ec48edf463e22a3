"""The built-in loop of tool calls: the policy answers, its calls are run, their outputs are what it reads next.

prompt with tool schemas -> turn -> <tool_call> ... -> outputs, masked out of the loss -> turn -> ... -> no call: the end
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile

from transformers import PreTrainedTokenizerBase

from qwench.config.sections.agent import AgentConfig
from qwench.data.chat import ChatRenderer, as_prompt
from qwench.errors import ConfigError, QwenchError
from qwench.plugins import guarded, load_function, load_object
from qwench.rollout.generate import GenerateContext
from qwench.samples import Json, Message, Sample, Status

ExecuteTool = Callable[[str, Json], Awaitable[str]]
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
MESSAGES = "messages"
"""Entry of `Sample.metadata` that holds the conversation, with --save-debug-trajectory-data."""
_MARK = "answer-of-the-policy"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call that the policy wrote."""

    name: str
    arguments: Json


class ToolLoop:
    """A `GenerateFunction`."""

    def __init__(
        self,
        *,
        tools: Sequence[Json] | None,
        execute: ExecuteTool,
        max_turns: int,
        template_kwargs: Json,
        splits: bool = False,
        records: bool = False,
    ) -> None:
        """Keep what every sample needs.

        Args:
            splits: return each turn as a sample. records: keep the messages in `Sample.metadata`.
        """
        self._tools, self._execute, self._max_turns = tools, execute, max_turns
        self._template_kwargs, self._splits, self._records = template_kwargs, splits, records

    @classmethod
    def load(cls, section: AgentConfig, *, template_kwargs: Json, records: bool = False) -> ToolLoop:
        """Load the user's schemas and the function that runs tools.

        Raises:
            ConfigError: one cannot be loaded, or has another form.
        """
        flag, path = "--generate-execute-tool-function-path", section.generate_execute_tool_function_path
        assert path is not None, "AgentConfig.check_generate asks for it"
        function = load_function(path, flag=flag, num_arguments=2, called_as="await fn(name, arguments)")
        return cls(
            tools=_load_tools(section.generate_tool_specs_path),
            execute=guarded(function, path=path, flag=flag),
            max_turns=section.generate_max_turns,
            template_kwargs=template_kwargs,
            splits=section.generate_multi_samples,
            records=records,
        )

    async def generate(self, sample: Sample, context: GenerateContext) -> Sample | list[Sample]:
        """Write turns until one has no call, or the turns or the budget are used up."""
        if not sample.response_length:
            show_messages(sample, context.tokenizer, tools=self._tools, template_kwargs=self._template_kwargs)
            self._record(sample, as_prompt(sample.prompt.messages, place=sample.prompt.place))
        for turn_number in range(_num_turns(sample), self._max_turns):
            turn = await context.generate(sample)
            text = _last_turn(sample, context)
            if turn.status is not Status.ABORTED:
                self._record(sample, [{"role": "assistant", "content": text.removesuffix(str(context.tokenizer.eos_token))}])
            calls = parse_calls(text)[1] if turn.status is Status.COMPLETED else []
            if not calls or turn_number + 1 == self._max_turns:
                break
            outputs = [{"role": "tool", "name": call.name, "content": await self._run(call)} for call in calls]
            append_messages(sample, outputs, context, tools=self._tools, template_kwargs=self._template_kwargs)
            self._record(sample, outputs)
        return split_turns(sample, context) if self._splits else sample

    def _record(self, sample: Sample, messages: Sequence[Message]) -> None:
        if self._records:
            sample.metadata.setdefault(MESSAGES, []).extend(messages)

    async def _run(self, call: ToolCall) -> str:
        output = await self._execute(call.name, call.arguments)
        if not isinstance(output, str):
            raise QwenchError(f"--generate-execute-tool-function-path must return text for {call.name}, got {output!r:.200}.")
        return output


def split_turns(sample: Sample, context: GenerateContext) -> list[Sample]:
    """Return each turn of the policy as a sample. A sample that was cut off stays whole, since it will go on.

    [prompt] turn 1 [context] turn 2  ->  [prompt] turn 1  and  [prompt turn 1 context] turn 2
    """
    if sample.status is Status.ABORTED:
        return [sample]
    length, turns, start = len(sample.tokens) - sample.response_length, list[Sample](), 0
    for sampled, run in groupby(sample.loss_mask):
        stop = start + len(list(run))
        if sampled:
            turns.append(_turn(sample, context, length, start, stop))
        start = stop
    if turns:
        turns[-1].status = sample.status
        turns[-1].input_tokens, turns[-1].cached_tokens = sample.input_tokens, sample.cached_tokens
    return turns or [sample]


def _turn(sample: Sample, context: GenerateContext, prompt_len: int, start: int, stop: int) -> Sample:
    """Return the turn of response tokens `start` to `stop`; what is counted of the requests belongs to the last one."""
    before, part = sample.tokens[: prompt_len + start], slice(start, stop)
    return Sample(
        prompt=replace(sample.prompt, text=str(context.tokenizer.decode(before)), token_ids=tuple(before)),
        sample_id=sample.sample_id,
        group_id=sample.group_id,
        tokens=sample.tokens[: prompt_len + stop],
        response_length=stop - start,
        loss_mask=sample.loss_mask[part],
        rollout_log_probs=sample.rollout_log_probs[part],
        weight_versions=sample.weight_versions[part],
        support=sample.support[part],
        response=context.decode(sample.response_tokens[part]),
        status=Status.COMPLETED,
        metadata=dict(sample.metadata),
    )


def _num_turns(sample: Sample) -> int:
    """Return how many turns of the policy a sample has that outputs of tools follow."""
    return sum(not sampled for sampled, _ in groupby(sample.loss_mask))


def _last_turn(sample: Sample, context: GenerateContext) -> str:
    """Return the text of the policy's last turn, also the part from before the sample was cut off."""
    length = len(list(takewhile(bool, reversed(sample.loss_mask))))
    text = context.tokenizer.decode(sample.response_tokens[-length:], skip_special_tokens=False) if length else ""
    assert isinstance(text, str), "one list of ids decodes to one text"
    return text


def parse_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Return the text before the first call, and the calls; one that is no JSON object with a name is left out."""
    calls = []
    for found in _CALL.finditer(text):
        try:
            record = json.loads(found[1])
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("name"), str):
            calls.append(ToolCall(name=record["name"], arguments=record.get("arguments", record.get("parameters", {}))))
    return text.partition("<tool_call>")[0] if calls else text, calls


def show_messages(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Json] | None,
    template_kwargs: Json,
    messages: Sequence[Message] | None = None,
) -> None:
    """Make the rendered messages, those of the row where none are given, the prompt of a sample."""
    place = sample.prompt.place or f"sample {sample.sample_id}"
    rendered = ChatRenderer(tokenizer, template_kwargs=template_kwargs).render(
        as_prompt(list(messages) if messages is not None else sample.prompt.messages, place=place),
        tools=list(tools) if tools else sample.prompt.tools,
        add_generation_prompt=True,
        place=place,
    )
    token_ids = tuple(tokenizer.encode(rendered, add_special_tokens=False))
    sample.prompt = replace(sample.prompt, text=rendered, token_ids=token_ids)
    sample.tokens = list(token_ids)


def append_messages(
    sample: Sample,
    messages: Sequence[Message],
    context: GenerateContext,
    *,
    tools: Sequence[Json] | None,
    template_kwargs: Json,
) -> None:
    """Append messages after a turn of the policy, up to the beginning of its next turn.

    Only what the chat template writes after the turn is tokenised; the turn keeps the tokens that were sampled.
    """
    before: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    whole = ChatRenderer(context.tokenizer, template_kwargs=template_kwargs).render(
        [*before, *messages], tools=tools, add_generation_prompt=True, place=f"sample {sample.sample_id}"
    )
    text, end = whole.rpartition(_MARK)[2], context.tokenizer.eos_token
    if isinstance(end, str) and sample.tokens[-1] == context.tokenizer.eos_token_id:
        text = text.removeprefix(end)
    context.append_context(sample, text)


def _load_tools(path: str | None) -> Sequence[Json] | None:
    if path is None:
        return None
    tools = load_object(path, flag="--generate-tool-specs-path")
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise ConfigError(f"--generate-tool-specs-path {path!r} must name a list of tool schemas, got {tools!r:.200}.")
    return tools
