"""What user functions of slime's or miles' convention share in the driver's process."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import aiohttp
from transformers import PreTrainedTokenizerBase

from qwench.config.sections.timeouts import TimeoutConfig
from qwench.errors import ConfigError, EngineError
from qwench.foreign.gateway import CURRENT_CALL, Gateway
from qwench.foreign.sample import Foreign, RolloutFnEvalOutput, RolloutFnTrainOutput, Sample
from qwench.foreign.translate import from_foreign
from qwench.rollout.groups import Grader
from qwench.rollout.sampling import Sampling

Result = TypeVar("Result")
_RETRY_S = 1.0
_DEFAULTS = TimeoutConfig()


@dataclass(kw_only=True, slots=True)
class Session:
    """What functions of slime and miles find in globals, for one run."""

    args: Namespace
    tokenizer: PreTrainedTokenizerBase
    gateway: Gateway
    loop: asyncio.AbstractEventLoop
    """That of the engines; all coroutines of user functions run on it."""
    sampling: Sampling
    grader: Grader
    """The built-in rewards, for functions that ask for them."""
    needs_log_probs: str | None = None
    """Flag that needs the engine's log-probs; None: nothing does."""
    data_source: Foreign = None
    """The user's own (--data-source-path); None: the run reads --prompt-data."""
    given_source: Foreign = None
    """What the rollout function that runs takes prompts from."""
    make_rollout: Callable[[int], Awaitable[RolloutFnTrainOutput]] | None = None
    """The built-in rollout, while a rollout function runs."""
    evaluate: Callable[[], Awaitable[RolloutFnEvalOutput]] | None = None
    """The built-in evaluation, while an evaluation function runs."""
    answer_timeout_s: float = _DEFAULTS.generate_timeout
    """For an answer of a server, as of the run's own requests."""
    state: GenerateState | None = None
    """Made by the first function that asks for it."""


_sessions: list[Session] = []


def open_session(session: Session) -> None:
    """Make a session the one that stand-ins use."""
    _sessions.append(session)


def close_session() -> None:
    """Forget the newest session."""
    _sessions.pop()


def current_session() -> Session:
    """Return the session of the run.

    Raises:
        ConfigError: there is no run, as when a module posts while it is imported.
    """
    if not _sessions:
        raise ConfigError("a function of slime or miles asked for engines or flags outside of a run.")
    return _sessions[-1]


async def post(
    url: str, payload: Foreign, max_retries: int = 60, headers: Mapping[str, str] | None = None, action: str = "post"
) -> Foreign:
    """Send JSON and return the JSON of the answer; what cannot connect is tried again."""
    session = _sessions[-1] if _sessions else None
    if session is not None and url == f"{session.gateway.url}/generate":
        return await session.gateway.answer(payload)
    return await _ask(url, method=action, max_retries=max_retries, headers=headers, json=payload)


async def get(url: str, **_: Foreign) -> Foreign:
    """Return the JSON at an address."""
    return await _ask(url, method="get", max_retries=1, headers=None)


async def wait_http_ok(
    url: str,
    *,
    json_payload: Foreign = None,
    timeout: float = 180.0,
    request_timeout: float = 60.0,  # theirs
) -> None:
    """Return when an address answers with status 200.

    Raises:
        TimeoutError: it did not within `timeout` seconds.
    """
    method, deadline = "GET" if json_payload is None else "POST", time.monotonic() + timeout
    while True:
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=request_timeout)) as client,
                client.request(method, url, json=json_payload) as answer,
            ):
                if answer.status == HTTPStatus.OK:
                    return
                last = f"status {answer.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            last = repr(error)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} was not ready after {timeout:g} s: {last}.")
        await asyncio.sleep(_RETRY_S)


async def _ask(url: str, *, method: str, max_retries: int, headers: Mapping[str, str] | None, **options: Foreign) -> Foreign:
    timeout_s = _sessions[-1].answer_timeout_s if _sessions else _DEFAULTS.generate_timeout
    for attempt in range(max_retries + 1):
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as client,
                client.request(method.upper(), url, headers=headers, **options) as answer,
            ):
                answer.raise_for_status()
                return await answer.json(content_type=None)
        except aiohttp.ClientConnectionError as error:
            if attempt == max_retries:
                raise EngineError(f"{url} was not reached in {max_retries + 1} tries: {error}.") from error
            await asyncio.sleep(_RETRY_S)
        except TimeoutError as error:
            raise EngineError(f"{url} gave no answer within {timeout_s:g} s.") from error
    raise AssertionError("the last try returns or raises")


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on the engines' loop, from a plain function in a thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, current_session().loop).result()


async def grade(args: Foreign, sample: Sample, **_: Foreign) -> Foreign:
    """Grade by the built-in reward that args.rm_type or the sample's metadata names."""
    session = current_session()
    ours = from_foreign(sample, like=None, tokenizer=session.tokenizer)
    if "rm_type" not in ours.metadata and getattr(args, "rm_type", None):
        ours.metadata["rm_type"] = args.rm_type
    verdict = await session.grader.grade(ours)
    return dict(verdict.extra) if {"score", "acc"} <= set(verdict.extra) else verdict.score


async def grade_all(args: Foreign, samples: Sequence[Sample], **_: Foreign) -> list[Foreign]:
    """Grade each sample."""
    return list(await asyncio.gather(*(grade(args, sample) for sample in samples)))


class GenerateState:
    """What a generate function shares between its calls; one for a run."""

    def __init__(self, args: Foreign) -> None:
        session = current_session()
        if session.state is self:
            return
        session.state = self
        self.args, self.tokenizer, self.processor = args, session.tokenizer, None
        self.semaphore = asyncio.Semaphore(max(args.sglang_server_concurrency * max(args.rollout_num_engines, 1), 1))
        self.sampling_params = sampling_params(session.sampling)
        self.reset()

    def __new__(cls, args: Foreign = None) -> GenerateState:
        """Return the state of the session."""
        return current_session().state or super().__new__(cls)

    @property
    def aborted(self) -> bool:
        """Tell whether the rollout is being ended."""
        call = CURRENT_CALL.get()
        return call is not None and call.requests.aborting

    @contextmanager
    def dp_rank_context(self) -> Iterator[int]:
        """Return the one data-parallel rank of an engine."""
        yield 0

    def reset(self) -> None:
        """Forget the groups under way."""
        self.remaining_batch_size, self.pendings = 0, set[Foreign]()


def sampling_params(sampling: Sampling, *, budget: int | None = None, seed: int | None = None) -> dict[str, Foreign]:
    """Return the sampling values of a request as a generate function gets them."""
    whole = sampling.whole
    values: dict[str, Foreign] = {
        "temperature": whole.temperature,
        "top_p": whole.top_p,
        "top_k": whole.top_k,
        "max_new_tokens": whole.max_new_tokens if budget is None else budget,
        "stop": list(whole.stop) or None,
        "stop_token_ids": list(whole.stop_token_ids) or None,
        "skip_special_tokens": whole.skip_special_tokens,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    return values if seed is None else {**values, "sampling_seed": seed}
