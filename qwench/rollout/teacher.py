"""Teachers on servers: they score finished samples with SGLang's log-probs of prompt tokens (--opd-type sglang).

    finished sample -> teacher                          log-probs of its response          -> Sample.teacher_log_probs
                    -> engine and teacher, with top k   of the k likeliest tokens of each  -> Sample.teacher_kl

All log-probs are those of temperature 1. A response is scored beside its grading, so the engines do not wait for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from http.client import HTTPException
from itertools import count, zip_longest

from transformers import PreTrainedTokenizerBase

from qwench.config.sections.distillation import DEFAULT_TEACHER, DistillationConfig, TopKStrategy, WeightMode
from qwench.engines.client import HttpEngine
from qwench.engines.protocol import FinishReason, GenerateRequest, SamplingParams, Scores, Scoring
from qwench.errors import ConfigError, EngineError, EngineLostError
from qwench.rewards.remote import check_reachable, pause_s
from qwench.rollout.generate import Requests
from qwench.samples import Prompt, Sample

ATTEMPTS = 6
PROBE = "Let x = \\frac{1}{2} + 12345;\n\tdef f(self): ... \u00fcber \u4f60\u597d \U0001f642 "
"""A text whose tokens tell tokenizers apart; the policy's special tokens follow it."""
_PROBE_TIMEOUT_S = 60.0
_REQUESTS_AT_ONCE = 64
_logger = logging.getLogger(__name__)
_SCORE_ONLY = SamplingParams(max_new_tokens=0, temperature=0.0)


class Teachers:
    """The servers of a run. Opens its connections in the loop that asks first."""

    def __init__(self, section: DistillationConfig, urls: Mapping[str, str], *, generate_timeout_s: float) -> None:
        """Take the address of each teacher by name; see `DistillationConfig.teacher_urls`."""
        self._section = section
        self._servers = {
            name: HttpEngine(server_url(url), label=f"teacher {name}", generate_timeout_s=generate_timeout_s)
            for name, url in urls.items()
        }
        self._places = asyncio.Semaphore(_REQUESTS_AT_ONCE)
        self._ids = (f"teacher-{i}" for i in count())

    def check_reachable(self) -> None:
        """Check that every server listens.

        Raises:
            ConfigError: one does not.
        """
        for name, server in self._servers.items():
            check_reachable(server.base_url, what=f"the teacher {name}", flag=self._section.teacher_flag)

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that every server reads a text as the tokens that the policy reads; a warning names one that does not tell.

        Raises:
            ConfigError: one reads other tokens, so its scores would be those of another text.
        """
        text = PROBE + "".join(tokenizer.all_special_tokens)
        ours = [int(token) for token in tokenizer(text)["input_ids"]]
        for name, server in self._servers.items():
            try:
                theirs = _tokens_of(server.base_url, text)
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                _logger.warning(
                    "the teacher %s (%s) does not tell how it reads a text (%s): whether it has the policy's tokenizer is not "
                    "checked",
                    name,
                    server.base_url,
                    error,
                )
                continue
            if theirs != ours:
                at = next(i for i, pair in enumerate(zip_longest(ours, theirs)) if pair[0] != pair[1])
                raise ConfigError(
                    f"the teacher {name} {self._section.teacher_flag} {server.base_url} has another tokenizer than "
                    f"--hf-checkpoint: it reads a text as {theirs[at : at + 3]} from token {at} on where the policy reads "
                    f"{ours[at : at + 3]}, so it would score other text; give a teacher with the policy's tokenizer"
                )

    async def teach(self, sample: Sample, policy: Requests) -> None:
        """Set the teacher's scores of a finished sample; leave them out when the rollout is aborted during the request.

        Raises:
            EngineError: a server cannot be reached or refused, or no teacher is meant for the sample.
        """
        if sample.response_length == 0:
            return
        server, tokens = self._server_of(sample), list(sample.tokens)
        start, top_k = len(tokens) - sample.response_length, self._section.opd_log_prob_top_k
        if top_k == 0:
            sample.teacher_log_probs = list((await self._ask(server, tokens, Scoring(start=start))).log_probs)
            return
        strategy = self._section.opd_top_k_strategy
        of_student = Scoring(start=start, top_k=top_k if strategy != "only-teacher" else 0)
        own = await self._ask_policy(policy, tokens, of_student)
        if own is None:
            return
        wants_own = strategy in ("only-student", "union", "xor")
        of_teacher = Scoring(
            start=start,
            top_k=top_k if strategy != "only-student" else 0,
            token_ids=_token_ids(own) if wants_own else (),
        )
        theirs = await self._ask(server, tokens, of_teacher)
        teacher = _by_position(theirs, of_teacher)
        student = _by_position(own, of_student) or [dict[int, float]() for _ in teacher]
        if strategy in ("only-teacher", "union", "xor"):
            on_theirs = Scoring(start=start, token_ids=_token_ids(theirs))
            again = await self._ask_policy(policy, tokens, on_theirs)
            if again is None:
                return
            student = [{**one, **more} for more, one in zip(student, _by_position(again, on_theirs), strict=True)]
        own_top, their_top = own.top or [()] * len(teacher), theirs.top or [()] * len(teacher)
        sample.teacher_log_probs, sample.teacher_kl = list(theirs.log_probs), []
        for p, q, mine, others in zip(student, teacher, own_top, their_top, strict=True):
            ids = choose_tokens([token for _, token in mine], [token for _, token in others], strategy)
            kl = weighted_reverse_kl([p[i] for i in ids], [q[i] for i in ids], self._section.opd_reward_weight_mode, strategy)
            sample.teacher_kl.append(kl)

    async def close(self) -> None:
        """Close the connections."""
        for server in self._servers.values():
            await server.close()

    def _server_of(self, sample: Sample) -> HttpEngine:
        """Return the teacher that the row's metadata names, or the default one."""
        key = self._section.opd_teacher_key
        name = sample.metadata.get(key, sample.prompt.metadata.get(key))
        server = self._servers.get(str(name)) or self._servers.get(DEFAULT_TEACHER)
        if server is None:
            raise EngineError(f"sample {sample.sample_id} {_why_untaught(self._section, name, self._servers)}.")
        return server

    async def _ask(self, server: HttpEngine, tokens: Sequence[int], scoring: Scoring) -> Scores:
        """Return a teacher's scores; a server that is gone or aborts is asked again, while it may restart."""
        for attempt in range(ATTEMPTS):
            request = GenerateRequest(request_id=next(self._ids), input_ids=tokens, sampling=_SCORE_ONLY, scoring=scoring)
            try:
                async with self._places:
                    result = await server.generate(request)
                if result.scores is None:
                    raise EngineLostError(f"{server!r} aborted a request for scores")
                return result.scores
            except EngineLostError as cause:
                if attempt == ATTEMPTS - 1:
                    raise EngineError(f"{cause} (asked {ATTEMPTS} times)") from cause
                await asyncio.sleep(pause_s(attempt))
        raise AssertionError("the last attempt returns or raises")

    async def _ask_policy(self, policy: Requests, tokens: Sequence[int], scoring: Scoring) -> Scores | None:
        """Return the policy's own scores; None: the rollout is aborted."""
        if scoring.top_k == 0 and not scoring.token_ids:
            return Scores()
        result = await policy.send(list(tokens), _SCORE_ONLY, scoring=scoring)
        return None if result.finish_reason is FinishReason.ABORT else result.scores


def _tokens_of(url: str, text: str) -> list[int]:
    """Return the tokens as which a server reads a text; any answer that is not SGLang's raises an error."""
    scoring = {"return_logprob": True, "logprob_start_len": 0}
    body = {"text": text, "sampling_params": {"max_new_tokens": 0, "temperature": 0}, **scoring}
    asked = urllib.request.Request(
        f"{url}/generate", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(asked, timeout=_PROBE_TIMEOUT_S) as response:
        return [int(token) for _, token, *_ in json.loads(response.read())["meta_info"]["input_token_logprobs"]]


def server_url(url: str) -> str:
    """Return the server's address of the URL of its /generate, which slime and miles name."""
    return url.rstrip("/").removesuffix("/generate")


def check_teachers(section: DistillationConfig, rm_url: str | None, prompts: Iterable[Prompt]) -> None:
    """Check before the run that every row has a teacher.

    Raises:
        ConfigError: a row has none.
    """
    urls = section.teacher_urls(rm_url)
    if not urls or DEFAULT_TEACHER in urls:
        return
    for row, prompt in enumerate(prompts):
        name = prompt.metadata.get(section.opd_teacher_key)
        if str(name) not in urls:
            raise ConfigError(f"{prompt.place or f'row {row} of the prompts'} {_why_untaught(section, name, urls)}")


def _why_untaught(section: DistillationConfig, name: object, known: Iterable[str]) -> str:
    return (
        f"has metadata.{section.opd_teacher_key} {name!r}, and --opd-teacher-urls names {', '.join(known)}; add NAME=URL "
        f"for it, or {DEFAULT_TEACHER}=URL for all others"
    )


def choose_tokens(student: Sequence[int], teacher: Sequence[int], strategy: TopKStrategy) -> list[int]:
    """Return the tokens of one position whose log-probs are compared, from the k likeliest of either model."""
    both = set(student) & set(teacher)
    if strategy == "only-student":
        return list(student)
    if strategy == "only-teacher":
        return list(teacher)
    if strategy == "intersection":
        return [token for token in student if token in both]
    either = [*student, *(token for token in teacher if token not in both)]
    return either if strategy == "union" else [token for token in either if token not in both]


def weighted_reverse_kl(
    student: Sequence[float], teacher: Sequence[float], weight_mode: WeightMode, strategy: TopKStrategy
) -> float:
    """Return sum_i w_i (log p_i - log q_i) over the chosen tokens of one position; 0 without any.

    w is p (student_p), q (teacher_p) or 1 (none), divided by its sum, but for xor, which leaves it as it is.
    """
    logs = {"student_p": student, "teacher_p": teacher, "none": [0.0] * len(student)}[weight_mode]
    weights = [math.exp(one) for one in logs]
    total = sum(weights) if strategy != "xor" else 1.0
    if total == 0:
        return 0.0
    return sum(w * (p - q) for w, p, q in zip(weights, student, teacher, strict=True)) / total


def _token_ids(scores: Scores) -> tuple[int, ...]:
    """Return all tokens that are likeliest at some position: a server takes one list for all positions."""
    return tuple(sorted({token for row in scores.top for _, token in row}))


def _by_position(scores: Scores, scoring: Scoring) -> list[dict[int, float]]:
    """Return the known log-probs of each position."""
    named = scores.of_token_ids or [()] * len(scores.log_probs)
    top = scores.top or [()] * len(named)
    return [
        {token: one for one, token in likeliest} | dict(zip(scoring.token_ids if row else (), row, strict=True))
        for likeliest, row in zip(top, named, strict=True)
    ]
