"""The sample of slime and miles, and what functions return there: plain classes that take further attributes.

Names, types and defaults are those of slime's and miles' `utils.types`, `rollout.base_types` and `filter_hub.base_types`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from transformers import PreTrainedTokenizerBase

Foreign = Any  # what a user's function holds: there is no closed type for it


class SampleStatus(Enum):
    """Life of a sample."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


class PrefixCacheInfo:
    """Prompt tokens, and those whose KV the engine already held."""

    def __init__(self, cached_tokens: int = 0, total_prompt_tokens: int = 0) -> None:
        self.cached_tokens, self.total_prompt_tokens = cached_tokens, total_prompt_tokens

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Return the share of prompt tokens that were cached."""
        return self.cached_tokens / self.total_prompt_tokens if self.total_prompt_tokens else 0.0

    def add(self, meta_info: Mapping[str, Any]) -> None:
        """Count one request."""
        self.cached_tokens += meta_info.get("cached_tokens", 0)
        self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)

    def to_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"cached_tokens": self.cached_tokens, "total_prompt_tokens": self.total_prompt_tokens}


@dataclass
class Sample:
    """A prompt and its response; `tokens` is empty until something is generated."""

    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: Foreign = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    status: SampleStatus = SampleStatus.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    teacher_log_probs: list[float] | None = None
    multimodal_inputs: Foreign = None
    multimodal_train_inputs: Foreign = None
    rollout_routed_experts: Foreign = None
    rollout_top_p_token_ids: Foreign = None
    rollout_top_p_token_offsets: Foreign = None
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    session_id: str | None = None
    routing_key: str | None = None
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    non_generation_time: float = 0.0
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

    Status = SampleStatus

    @property
    def effective_response_length(self) -> int:
        """Return the number of trained tokens."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    @property
    def oldest_weight_version(self) -> int | None:
        """Return the lowest version that sampled a part of the response."""
        return min((int(version) for version in self.weight_versions), default=None)

    def get_reward_value(self, args: Foreign) -> Foreign:
        """Return the reward, or what --reward-key names of it."""
        return self.reward[args.reward_key] if getattr(args, "reward_key", None) else self.reward

    def append_response_tokens(
        self,
        args: Foreign = None,
        *,
        tokens: Sequence[int],
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: Mapping[str, Any] | None = None,
        text: str = "",
        update_terminal_info: bool = True,
    ) -> None:
        """Extend the response by sampled tokens, or by context that is not trained on."""
        if trainable and log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens came with {len(log_probs)} log-probs")
        mask, known = self.loss_mask, self.rollout_log_probs
        self.loss_mask = [*([1] * self.response_length if mask is None else mask), *([int(trainable)] * len(tokens))]
        fresh = list(log_probs) if trainable and log_probs is not None else [0.0] * len(tokens)
        self.rollout_log_probs = [*([0.0] * self.response_length if known is None else known), *fresh]
        self.tokens = [*self.tokens, *tokens]
        self.response += text
        self.response_length += len(tokens)
        if meta_info is not None and update_terminal_info:
            self.update_from_meta_info(args, meta_info)

    def update_from_meta_info(self, args: Foreign, meta_info: Mapping[str, Any]) -> None:
        """Take status, weight version and cache counts from an engine's answer."""
        self.prefix_cache_info.add(meta_info)
        if meta_info.get("weight_version") is not None:
            self.weight_versions.append(str(meta_info["weight_version"]))
        kinds = {"length": SampleStatus.TRUNCATED, "abort": SampleStatus.ABORTED, "stop": SampleStatus.COMPLETED}
        self.status = kinds.get(meta_info["finish_reason"]["type"], self.status)

    def strip_last_output_tokens(self, n: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Remove tokens at the end of the response."""
        if n <= 0:
            return
        self.tokens, self.response_length = self.tokens[:-n], self.response_length - n
        if self.loss_mask is not None:
            self.loss_mask = self.loss_mask[:-n]
        if self.rollout_log_probs is not None:
            self.rollout_log_probs = self.rollout_log_probs[:-n]
        text = tokenizer.decode(self.tokens[len(self.tokens) - self.response_length :])
        assert isinstance(text, str), "one list of ids decodes to one text"
        self.response = text

    def reset_for_retry(self) -> None:
        """Forget the response; the status says that it was aborted."""
        self.tokens, self.response, self.response_length = [], "", 0
        self.loss_mask = self.rollout_log_probs = self.reward = None
        self.weight_versions, self.status = [], SampleStatus.ABORTED

    def validate(self) -> None:
        """Check that per-token lists are as long as the response."""
        for name in ("loss_mask", "rollout_log_probs"):
            column = getattr(self, name)
            if column is not None and len(column) != self.response_length:
                raise ValueError(f"{name} has {len(column)} entries for {self.response_length} response tokens")
        if len(self.tokens) < self.response_length:
            raise ValueError(f"{len(self.tokens)} tokens cannot hold a response of {self.response_length}")

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes, further ones included."""
        return {**self.__dict__, "status": self.status.value, "prefix_cache_info": self.prefix_cache_info.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        """Read what `to_dict` returned."""
        values = dict(data)
        status, cache = (
            SampleStatus(values.pop("status", "pending")),
            PrefixCacheInfo(**(values.pop("prefix_cache_info", None) or {})),
        )
        known = {name: values.pop(name) for name in FIELDS if name in values}
        sample = cls(**known, status=status, prefix_cache_info=cache)
        sample.__dict__.update(values)
        return sample


FIELDS = frozenset(item.name for item in fields(Sample)) - {"status", "prefix_cache_info"}


@dataclass
class DynamicFilterOutput:
    """What a dynamic filter says of a group."""

    keep: bool
    reason: str | None = None
    keep_when_insufficient: bool = False


@dataclass
class RolloutFnTrainOutput:
    """A rollout: groups of samples."""

    samples: list[Foreign]
    metrics: dict[str, Any] | None = None


@dataclass
class RolloutFnEvalOutput:
    """An evaluation: set -> rewards, truncated, samples."""

    data: dict[str, dict[str, Any]]
    metrics: dict[str, Any] | None = None


@dataclass
class RolloutFnConstructorInput:
    """What a class of --rollout-function-path is made with."""

    args: Foreign
    data_source: Foreign


@dataclass
class RolloutFnTrainInput:
    """Which rollout is asked for."""

    rollout_id: int
    weight_version: int | None = None
    evaluation: bool = False


@dataclass
class RolloutFnEvalInput:
    """Which evaluation is asked for."""

    rollout_id: int
    weight_version: int | None = None
    evaluation: bool = True


@dataclass
class GenerateFnInput:
    """The one argument of a generate function of miles' newer form."""

    state: Foreign
    sample: Sample
    sampling_params: dict[str, Any]
    evaluation: bool

    @property
    def args(self) -> Foreign:
        """Return the namespace of flags."""
        return self.state.args


@dataclass
class GenerateFnOutput:
    """What such a function returns."""

    samples: Foreign


def leaves(answer: Foreign) -> Iterator[Sample]:
    """Yield the samples of a sample or of nested lists of them."""
    if isinstance(answer, list | tuple):
        for one in answer:
            yield from leaves(one)
    else:
        yield answer
