"""What an inference engine is: token ids in, token ids and log-probs out, weights and memory from outside.

    generate ---> waiting -> running -> finished (stop | length | abort)
    update_weights: only between forward passes; every later token carries the new version
    sleep/wake:   give memory back and take it again; no request may be running

Implementations: `engines.embedded` in this process, `engines.client` for any server with SGLang's HTTP API.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

from torch import Tensor

from qwench.wire.addresses import EngineAddress
from qwench.wire.portions import WeightBucket

LOW_PRIORITY = -1
"""Of the requests of an evaluation beside training."""


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class MemoryTag(StrEnum):
    """What an engine can give back while it sleeps."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn; the names and neutral values are SGLang's."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 means greedy; log-probs are then those of temperature 1."""
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Besides the model's end-of-sequence ids. The stop token stays in the output."""
    ignore_eos: bool = False
    skip_special_tokens: bool = False
    keeps_support: bool = False
    """Return the tokens that top_p, top_k and min_p keep, and log-probs that are normalised over them."""
    seed: int | None = None
    """Same seed, prompt and weights: same tokens, in any batch. None: the engine draws one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """Which log-probs of the prompt's own tokens are wanted. They are those of temperature 1."""

    start: int
    """First prompt token to score. At least 1: nothing predicts token 0."""
    top_k: int = 0
    """Return the likeliest tokens of each position too, as many as this."""
    token_ids: tuple[int, ...] = ()
    """Return the log-probs of these tokens at each position too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Log-probs of the N prompt tokens from `Scoring.start` on."""

    log_probs: Sequence[float] = ()
    """[N] float32 of the prompt's tokens."""
    top: Sequence[Sequence[tuple[float, int]]] = ()
    """[N, top_k] log-prob and token, the likeliest first."""
    of_token_ids: Sequence[Sequence[float]] = ()
    """[N, M] float32 of `Scoring.token_ids`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One response wanted, or with `scoring` the log-probs of the prompt."""

    request_id: str
    input_ids: Sequence[int]
    sampling: SamplingParams
    scoring: Scoring | None = None
    """Score the prompt and generate nothing: `sampling.max_new_tokens` is 0."""
    adapter: str | None = None
    """Name of a loaded LoRA adapter to compute with. None: the published weights alone."""
    priority: int = 0
    """Requests of a higher one are admitted first, and preempted last."""

    @property
    def yields(self) -> bool:
        """Tell whether it is of an evaluation beside training, which yields to rollouts."""
        return self.priority < 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateResult:
    """One response, perhaps cut short."""

    request_id: str
    output_ids: Sequence[int]
    """[R]"""
    log_probs: Sequence[float]
    """[R] float32, of the sampled tokens at the sampling temperature, before top-p/top-k/min-p without `keeps_support`."""
    finish_reason: FinishReason
    weight_versions: Sequence[int]
    """[R] version that sampled each token (a server that reports one version per response repeats it)."""
    support: Sequence[Sequence[int]] = ()
    """[R] the tokens that top-p, top-k and min-p kept; empty without `keeps_support`, or where none of them is on."""
    matched: int | str | None = None
    """The stop token or stop string that ended it."""
    text: str = ""
    cached_tokens: int = 0
    scores: Scores | None = None
    """Of a request with `scoring` that was not aborted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Load of an engine now, and its counters since it started."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_pages: int = 0
    num_pages: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    num_preempted: int = 0
    decode_steps: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """Number of a bucket and its publication. A receiver sees by it that no bucket is missing."""

    version: int
    index: int
    """0 begins a publication, also when an earlier one of the same version was not finished."""
    final: bool
    """No bucket follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightReceipt:
    """What an engine holds after a publication."""

    version: int
    checksums: Mapping[str, int] = field(default_factory=dict)
    """Name of each received tensor -> `wire.checksum.tensor_checksums` of what the engine holds."""


class Engine(Protocol):
    """See the module docstring. All methods are called from one event loop."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Return the response; an aborted request returns what it has, with FinishReason.ABORT."""
        ...

    async def abort(self, request_id: str | None = None) -> None:
        """End one request, or all of them when `request_id` is None."""
        ...

    async def pause(self, *, retract: bool = False) -> None:
        """Hold running requests where they are: no forward pass until `resume`.

        Args:
            retract: drop their keys and values, which are computed again, with the weights of then, after `resume`.
        """
        ...

    async def resume(self) -> None:
        """Go on after `pause`."""
        ...

    async def update_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> WeightReceipt:
        """Take over all weights (copied before returning), drop cached prefixes, and confirm.

        Raises:
            WeightSyncError: a name or shape the model does not have, or a parameter missing.
        """
        ...

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        """Give back the memory of `tags`; the KV cache's content is lost, weights must be published again.

        Raises:
            EngineError: a request is running.
        """
        ...

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        """Take the memory of `tags` again."""
        ...

    async def flush_cache(self) -> None:
        """Forget cached prefixes."""
        ...

    async def health(self) -> bool:
        """Tell whether the engine can generate."""
        ...

    async def stats(self) -> EngineStats:
        """Return load and counters."""
        ...

    async def weight_version(self) -> int:
        """Return the version of the weights in use."""
        ...

    async def close(self) -> None:
        """End everything this engine started."""
        ...


@runtime_checkable
class AdoptingEngine(Engine, Protocol):
    """An engine of this process that can compute with tensors it does not own."""

    async def adopt_weights(self, weights: Mapping[str, Tensor], *, version: int) -> WeightReceipt:
        """Use the given live tensors from now on, drop cached prefixes, and confirm."""
        ...


@runtime_checkable
class AddressedEngine(Engine, Protocol):
    """An engine behind a server, which any process can reach."""

    @property
    def address(self) -> EngineAddress:
        """Return how to reach its server."""
        ...
