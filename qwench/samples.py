"""The records that travel through a run: prompt -> sample -> group -> rollout.

Per-token lists of a `Sample` are response-aligned: entry i belongs to `tokens[len(prompt) + i]`. Engine token ids are
kept as they came; text is never tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

Json = Any  # what json.loads returns: there is no closed type for it
Message = Mapping[str, Json]


class Status(StrEnum):
    """Life of a sample: pending -> completed | truncated | aborted."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a reward function says of one response: a score and why."""

    score: float
    reason: str
    """The reward's word for the result: exact, within_tolerance, sympy_equal, wrong, no_think_marker, no_box, timeout ..."""
    extra: Mapping[str, Json] = field(default_factory=dict)
    """Further values of a reward that returns a record (dapo: acc, pred); `--reward-key` picks one as the score."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Score of each of several rewards, without their weights (`--rm-type a,b`); empty with one."""

    @property
    def graded(self) -> bool:
        """Tell whether the response was judged at all (false: the grader failed or ran out of time)."""
        return self.reason not in ("timeout", "grader_error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One row of a data set, rendered and tokenised."""

    text: str
    token_ids: tuple[int, ...]
    label: str | None = None
    messages: Sequence[Message] | str = ""
    """The row's raw input, before the chat template."""
    tools: Sequence[Json] | None = None
    metadata: Mapping[str, Json] = field(default_factory=dict)
    pass_rate: float | None = None
    """Of the row's --curriculum-key, from 0 to 1."""
    place: str = field(default="", compare=False)
    """File and line of the row, for messages: `train.jsonl:12`."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """A prompt and one response, filled in as generation and grading go on."""

    prompt: Prompt
    sample_id: int
    """Counts samples over the whole run."""
    group_id: int
    """Counts prompts over the whole run; siblings share it."""
    execution_id: int | None = None
    """Shared by samples that one execution of a multi-turn function returned (slime: `Sample.rollout_id`); None: sample_id."""
    tokens: list[int] = field(default_factory=list)
    """[L] prompt then response."""
    response_length: int = 0
    loss_mask: list[int] = field(default_factory=list)
    """[R] 1 where the token was sampled by the policy and is trained on."""
    rollout_log_probs: list[float] = field(default_factory=list)
    """[R] of the engine at the sampling temperature; 0.0 where loss_mask is 0."""
    weight_versions: list[int] = field(default_factory=list)
    """[R] version of the weights that sampled the token; -1 where loss_mask is 0."""
    support: list[list[int]] = field(default_factory=list)
    """[R] tokens that top-p, top-k and min-p kept beside the sampled one, itself included; `rollout_log_probs` are normalised
    over them. [] where loss_mask is 0; empty where sampling cuts nothing off."""
    teacher_log_probs: list[float] = field(default_factory=list)
    """[R] of a teacher on a server at temperature 1; empty without one."""
    teacher_kl: list[float] = field(default_factory=list)
    """[R] reverse KL to the teacher over the likeliest tokens; empty without --opd-log-prob-top-k."""
    ref_log_probs: list[float] = field(default_factory=list, compare=False)
    """[R] of the reference, where it scored this sample before the rollout was finished; else empty. In no record: a run that
    reads it may have another reference."""
    response: str = ""
    status: Status = Status.PENDING
    verdict: Verdict | None = None
    reward: float | None = None
    cached_tokens: int = 0
    """Prompt tokens whose KV the engine already held."""
    input_tokens: int = 0
    """Prompt tokens sent to the engine, over all requests of this sample; `cached_tokens` are among them."""
    metadata: dict[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.prompt.token_ids)
        if self.execution_id is None:
            self.execution_id = self.sample_id

    @property
    def graded(self) -> bool:
        """Tell whether the reward is a judgement of the response, not the 0 of a grader that failed or ran out of time."""
        return self.reward is not None and (self.verdict is None or self.verdict.graded)

    @property
    def response_tokens(self) -> list[int]:
        """Return the [R] token ids after the prompt."""
        return self.tokens[len(self.tokens) - self.response_length :]

    def append(
        self,
        token_ids: Sequence[int],
        *,
        log_probs: Sequence[float] | None,
        version: int,
        support: Sequence[Sequence[int]] = (),
    ) -> None:
        """Extend the response by sampled tokens, or by context (tool output) when `log_probs` is None.

        Context is masked out of the loss: it was not sampled by the policy.

        Args:
            support: the tokens that sampling kept at each; empty where it cuts nothing off.
        """
        if support or self.support:
            self.support += [[] for _ in range(self.response_length - len(self.support))]
            self.support += [list(ids) for ids in support] or [[] for _ in token_ids]
        sampled = log_probs is not None
        assert log_probs is None or len(log_probs) == len(token_ids), "one log-prob for each sampled token"
        self.tokens.extend(token_ids)
        self.response_length += len(token_ids)
        self.loss_mask.extend([int(sampled)] * len(token_ids))
        self.rollout_log_probs.extend(log_probs if log_probs is not None else [0.0] * len(token_ids))
        self.weight_versions.extend([version if sampled else -1] * len(token_ids))

    def begin_again(self) -> None:
        """Drop the response and what was counted of it; the prompt and the metadata stay."""
        fresh = Sample(prompt=self.prompt, sample_id=self.sample_id, group_id=self.group_id, execution_id=self.execution_id)
        for one in fields(self):
            if one.name != "metadata":
                setattr(self, one.name, getattr(fresh, one.name))

    def mask_out(self) -> None:
        """Take the whole response out of the loss; the tokens stay."""
        self.loss_mask = [0] * self.response_length
        self.rollout_log_probs = [0.0] * self.response_length
        self.support = [[] for _ in self.support]
        self.weight_versions = [-1] * self.response_length

    def to_record(self) -> dict[str, Json]:
        """Return a JSON-compatible copy that `from_record` reads back equal."""
        # Not asdict, which visits every token of every column in Python.
        copied = {one.name: copy(getattr(self, one.name)) for one in fields(self) if one.name != "ref_log_probs"}
        return {**copied, "prompt": asdict(self.prompt), "verdict": None if self.verdict is None else asdict(self.verdict)}

    @classmethod
    def from_record(cls, record: Mapping[str, Json]) -> Sample:
        """Read a sample written by `to_record`."""
        values = dict(record)
        prompt = dict(values.pop("prompt"))
        prompt["token_ids"] = tuple(prompt["token_ids"])
        verdict = values.pop("verdict")
        return cls(
            prompt=Prompt(**prompt),
            verdict=Verdict(**verdict) if verdict is not None else None,
            status=Status(values.pop("status")),
            **values,
        )


@dataclass(kw_only=True, slots=True)
class Group:
    """The samples of one prompt."""

    group_id: int
    samples: list[Sample]
    begun_under: int | None = None
    """Weight version under which it began, where that matters: an engine may name a later one for its tokens."""

    @property
    def rewards(self) -> list[float]:
        """Return the rewards of the graded samples; those whose grader failed have none, all others must have been graded."""
        assert all(sample.reward is not None for sample in self.samples), f"group {self.group_id} is not graded"
        return [float(sample.reward) for sample in self.samples if sample.graded and sample.reward is not None]

    def to_record(self) -> dict[str, Json]:
        """Return a JSON-compatible copy that `from_record` reads back equal."""
        begun = {} if self.begun_under is None else {"begun_under": self.begun_under}
        return {"group_id": self.group_id, "samples": [sample.to_record() for sample in self.samples], **begun}

    @classmethod
    def from_record(cls, record: Mapping[str, Json]) -> Group:
        """Read a group written by `to_record`."""
        samples = [Sample.from_record(sample) for sample in record["samples"]]
        return cls(group_id=record["group_id"], samples=samples, begun_under=record.get("begun_under"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """`rollout_batch_size` scored groups, in order of group id, and their metrics."""

    rollout_id: int
    groups: Sequence[Group]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        """Return all samples in order."""
        return [sample for group in self.groups for sample in group.samples]

    def with_metrics(self, metrics: Mapping[str, float]) -> Rollout:
        """Return the same rollout with further metrics."""
        return replace(self, metrics={**self.metrics, **metrics})

    def to_record(self) -> dict[str, Json]:
        """Return a JSON-compatible copy that `from_record` reads back equal."""
        groups = [group.to_record() for group in self.groups]
        return {"rollout_id": self.rollout_id, "metrics": dict(self.metrics), "groups": groups}

    @classmethod
    def from_record(cls, record: Mapping[str, Json]) -> Rollout:
        """Read a rollout written by `to_record`."""
        groups = [Group.from_record(group) for group in record["groups"]]
        return cls(rollout_id=record["rollout_id"], groups=groups, metrics=record["metrics"])
