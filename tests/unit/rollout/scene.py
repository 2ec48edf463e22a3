"""Prompts named a, b, c ... and the parts of a rollout around a fake engine."""

import asyncio
import string
from collections.abc import Callable
from types import SimpleNamespace

from qwench.config.sections.rollout import RolloutConfig
from qwench.data.prompts import PromptSource
from qwench.engines.protocol import GenerateRequest, SamplingParams
from qwench.errors import Stopped
from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.collect import Collector
from qwench.rollout.functions import RolloutFunctions
from qwench.rollout.generate import generate_single_turn
from qwench.rollout.groups import GroupRunner
from qwench.rollout.sampling import Sampling
from qwench.samples import Group, Prompt, Sample
from tests.deadlines import patient
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer, FakeEngine
from tests.fakes.grader import FakeGrader


def prompt(text: str, label: str | None = None) -> Prompt:
    return Prompt(text=text, token_ids=tuple(map(ord, text)), label=label)


def sample(text: str = "a", sample_id: int = 0, group_id: int = 0) -> Sample:
    return Sample(prompt=prompt(text), sample_id=sample_id, group_id=group_id)


def group(text: str = "a", *, size: int = 2, group_id: int = 0) -> Group:
    return Group(group_id=group_id, samples=[sample(text, group_id * size + i, group_id) for i in range(size)])


def letters_source(num_prompts: int = 26, *, n: int = 1) -> PromptSource:
    """Return a source of groups of prompts a, b, c ... with ids 0, 1, 2 ..."""
    prompts = [prompt(letter) for letter in string.ascii_lowercase[:num_prompts]]
    return PromptSource(prompts, n_samples_per_prompt=n, shuffle=False, seed=0)


def write_ok(context: str, request: GenerateRequest) -> str:
    return "ok"


def by_letter(table: dict[str, int | None], default: int = 0) -> Callable[[str, GenerateRequest], int | None]:
    """Return ticks that depend on the first character of the prompt."""
    return lambda context, request: table.get(context[0], default)


def make_runner(engine: FakeEngine, grader: FakeGrader, **options) -> GroupRunner:
    plain = {"group_rm": False, "generate": generate_single_turn, "generate_path": None}
    settings = {"concurrency": 64, "sampling": sampling_of(max_new_tokens=100), **plain, **options}
    return GroupRunner(engine, tokenizer=CharTokenizer(), grader=grader, **settings)


def make_collector(
    engine: FakeEngine, grader: FakeGrader, *, buffer: GroupBuffer | None = None, console=None, deterministic=False, **rules
) -> Collector:
    flags = {
        "rollout_batch_size": rules.pop("num_groups", 2),
        "over_sampling_batch_size": rules.pop("over_sampling", None),
        "dynamic_sampling_max_rounds": rules.pop("max_rounds", 10),
        "partial_rollout": rules.pop("partial_rollout", False),
    }
    return Collector(
        make_runner(engine, grader),
        buffer or GroupBuffer(letters_source()),
        RolloutConfig(**flags),
        RolloutFunctions(**rules),
        console=console or RecordingConsole(),
        deterministic=deterministic,
        curriculum=None,
    )


def prompts_of(groups: list[Group]) -> str:
    """Return the first letters of the groups' prompts."""
    return "".join(group.samples[0].prompt.text[0] for group in groups)


def sampling_of(*, max_context_len=None, seed_by_position=False, **values):
    """Return how responses are drawn, with the seed of a run."""
    whole = SamplingParams(**{"max_new_tokens": 10, "seed": 42, **values})
    return Sampling(whole=whole, max_context_len=max_context_len, seed_by_position=seed_by_position)


def stopped_at_the_last_moment(engines):
    """Wait for engines, and be interrupted by a signal when what is waited for has just ended."""

    def attend(coroutine, **wait):
        engines.run(coroutine, **wait)
        raise Stopped(15)

    return SimpleNamespace(attend=attend)


def stopped_in_the_middle(engines):
    """Wait for engines, and be interrupted by a signal when what is waited for has just begun."""

    def attend(coroutine, **wait):
        working = engines.loop.start(coroutine)
        engines.run(asyncio.sleep(0), label="let it begin", timeout_s=patient(20))
        working.cancel()
        engines.run(asyncio.sleep(0), label="let it end", timeout_s=patient(20))
        raise Stopped(15)

    return SimpleNamespace(attend=attend)
