"""`--rm-type judge`: a language model behind an OpenAI-compatible URL reads the response and says a score.

    template with {prompt}, {response}, {label} -> POST --judge-url/chat/completions -> the last "Score: 0.5" of its answer

A request that fails is sent again until --judge-timeout-s, which does not count the wait for one of the places of requests. A
late or unreadable answer leaves the response ungraded, and is counted; a refusal (400 to 499) ends the run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from qwench.config.sections.reward import RewardConfig
from qwench.errors import ConfigError, RewardError
from qwench.files import read_small_text
from qwench.rewards.remote import JsonServer
from qwench.rewards.scores import Answer
from qwench.samples import Sample, Verdict

JUDGE = "judge"
PROMPT_TOKENS, ANSWER_TOKENS = "judge_prompt_tokens", "judge_completion_tokens"
"""Entries of a verdict's record: what its request cost."""
_FIELDS = re.compile(r"\{(prompt|response|label)\}")
_QUOTE = "[\"'\u201c\u201d\u2018\u2019]"
_GAP = r"[ \t*_`]{0,4}"
_OF = rf"{_GAP}(?:/|out[ \t]+of|of){_GAP}"
_PERCENT = rf"{_GAP}(?:%|percent\b)"
_KEYS = r"(?:(?:final|overall)[ _-]?)?score"
_MARKS = r"[\s*_`]{0,4}"
_BARE = rf"score(?:{_MARKS}[:=]{_MARKS}{_QUOTE}|[\s:=*_`]{{0,8}})"
_SAID = rf"(?:{_BARE}|{_QUOTE}{_KEYS}{_QUOTE}\s{{0,8}}:\s{{0,8}}{_QUOTE}?)"
"""`Score: 0.5` and, in an answer that is JSON, `"score": 0.5` or `"final_score": 0.5`; but no `"max_score": 1`."""
_SCORE = re.compile(
    rf"{_SAID}(-?\.?\d[0-9a-z.,%+-]*(?:{_PERCENT}|{_OF}[-.]?\d[0-9a-z./,%+-]*|{_GAP}-{_GAP}\d+)?)", re.IGNORECASE
)
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)
_SHOWN_CHARS = 200
TEMPLATE = """\
Judge the response to the task below. If a reference answer is given, the response must agree with it.

Task:
{prompt}

Reference answer:
{label}

Response:
{response}

Say in a few words what is right and what is wrong. End with one line "Score: X", where X is a number from 0 (useless) to 1
(perfect).
"""


class Judge:
    """Asks one server; any number of samples at once, of which a bounded number is sent."""

    def __init__(self, reward: RewardConfig, *, key: str | None) -> None:
        """Read the template.

        Raises:
            ConfigError: see `read_template`, or the section names no server.
        """
        if reward.judge_url is None or reward.judge_model is None:
            raise ConfigError("--rm-type judge asks a language model; give --judge-url and --judge-model")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = reward.judge_url.rstrip("/") + "/chat/completions"
        self._server = JsonServer(url, flag="--judge-url", headers=headers, deadline_s=reward.judge_timeout_s)
        self._template = read_template(reward)
        self._model = reward.judge_model
        self._scores = reward.judge_scores

    async def grade(self, sample: Sample) -> Verdict:
        """Return the model's verdict on one sample.

        Raises:
            RewardError: the server refused.
        """
        question = fill_template(self._template, sample)
        body = {"model": self._model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        try:
            answer = await self._server.ask(body, what=f"sample {sample.sample_id}")
        except TimeoutError as late:
            return Verdict(score=0.0, reason="timeout", extra={"error": str(late)})
        return read_verdict(answer, scores=self._scores)


def read_template(reward: RewardConfig) -> str:
    """Return the text of --judge-prompt-path, or the built-in one.

    Raises:
        ConfigError: it cannot be read, or has no place for the response.
    """
    if reward.judge_prompt_path is None:
        return TEMPLATE
    try:
        template = read_small_text(reward.judge_prompt_path)
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(
            f"--judge-prompt-path {reward.judge_prompt_path} cannot be read: {cause}; give a text file"
        ) from cause
    if "{response}" not in template:
        raise ConfigError(
            f"--judge-prompt-path {reward.judge_prompt_path} has no {{response}}, so the judge would see none; add it"
        )
    return template


def fill_template(template: str, sample: Sample) -> str:
    """Return the question about a sample. What a response holds is not filled in again."""
    values = {"prompt": sample.prompt.text, "response": sample.response, "label": sample.prompt.label or "(none)"}
    return _FIELDS.sub(lambda found: values[found[1]], template)


def read_verdict(answer: Answer, *, scores: Sequence[float]) -> Verdict:
    """Return the last score that a chat completion says, with what it cost.

    Args:
        scores: the lowest and the highest of the judge's scale; a score outside of it is no verdict.

    Raises:
        RewardError: the server did not answer a chat completion.
    """
    try:
        text, usage = str(answer["choices"][0]["message"]["content"] or ""), answer.get("usage") or {}
        cost = {PROMPT_TOKENS: int(usage.get("prompt_tokens", 0)), ANSWER_TOKENS: int(usage.get("completion_tokens", 0))}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as cause:
        raise RewardError(
            f"--judge-url must answer a chat completion, got {str(answer)[:_SHOWN_CHARS]}; "
            "give the base URL of an OpenAI-compatible server."
        ) from cause
    (lowest, highest), said = scores, _said_score(text)
    score = None if said is None else read_score(said, highest=highest)
    if score is not None and lowest <= score <= highest:
        return Verdict(score=score, reason="judged", extra=cost)
    found = "no score" if score is None else f"a score outside of --judge-scores {lowest:g} {highest:g}"
    error = f"the judge said {found}: {text[-_SHOWN_CHARS:]!r}"
    return Verdict(score=0.0, reason="grader_error", extra={"error": error, **cost})


def _said_score(text: str) -> str | None:
    """Return the `score` of an answer that is a JSON object, whose other texts may speak of scores; else the last one said."""
    try:
        whole = json.loads(text.strip().removeprefix("```json").removeprefix("```").removesuffix("```"))
    except (ValueError, RecursionError):
        whole = None
    keys = [key for key in whole if re.fullmatch(_KEYS, key, re.IGNORECASE)] if isinstance(whole, dict) else []
    if keys:
        text = f"score: {whole[max(keys, key=len)]}"  # the final one, whichever comes first
    said = _SCORE.findall(text)
    return said[-1] if said else None


def read_score(text: str, *, highest: float) -> float | None:
    """Return a score: `0.5`, or a share of the highest one, as `7/10`, `7 out of 10` or `70%`; None: it is no number."""
    text = text.rstrip(".,-")
    percent = re.fullmatch(rf"(.*?){_PERCENT}", text, re.IGNORECASE)
    share, whole = (percent[1], "100") if percent else (text, None)
    number, *rest = re.split(_OF, share, flags=re.IGNORECASE)
    if rest and whole is None:
        whole, *rest = rest
    if rest or not all(_NUMBER.fullmatch(one) for one in (number, whole) if one is not None):
        return None
    if whole is None:
        return float(number)
    if highest <= 0:  # a share of it says nothing
        return None
    return highest * float(number) / float(whole) if float(whole) else math.inf
