"""Generation that goes on across publications."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from qwench.config.limits import check_not_negative, check_positive
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class AsyncConfig:
    """Fully asynchronous rollouts: the engines generate across publications, and training takes finished groups."""

    fully_async: bool = False
    """Generate while the trainer learns, across publications. Trainer and engines need devices of their own."""
    max_weight_staleness: int | None = None
    """Versions that a trained token may be older than the weights that learn from it. 0: generate and train in turn. Needs
    --fully-async. None: 1. Old samples bear a smaller step: divide the --lr that works in turn by 1 + this."""
    pause_generation_mode: Literal["retract", "in_place", "abort"] = "retract"
    """How a publication treats running requests. retract: recompute their KV cache with the new weights. in_place: keep their
    KV cache. abort: end them and send them again as new requests. No effect without --fully-async."""
    async_max_concurrent_samples: int | None = None
    """Samples in flight at once, over all engines. None: --sglang-server-concurrency times the number of engines."""
    async_data_buffer_capacity_factor: float = 2.0
    """Limit on finished groups that wait for training, as a multiple of --rollout-batch-size. No group begins above it. Ignored
    with --deterministic-mode."""
    async_unused_samples_handler: Literal["drop", "retry"] = "drop"
    """How to treat a group that an engine or a function aborted. drop: use the next prompt. retry: continue the group."""
    rollout_submission_granularity: Literal["sample", "group"] = "sample"
    """What a free slot of --async-max-concurrent-samples takes. sample: the next sample. group: a whole group, once there is
    room for all of its samples."""

    def __post_init__(self) -> None:
        check_positive("--async-max-concurrent-samples", self.async_max_concurrent_samples)
        if self.max_weight_staleness is not None:
            check_not_negative("--max-weight-staleness", self.max_weight_staleness)
        if not self.async_data_buffer_capacity_factor >= 1:
            raise ConfigError(
                f"--async-data-buffer-capacity-factor must be at least 1, got {self.async_data_buffer_capacity_factor}: the "
                "groups of a rollout must fit"
            )
        if not self.fully_async:
            for field in fields(self):
                if field.name != "pause_generation_mode" and getattr(self, field.name) != field.default:
                    raise ConfigError(f"--{field.name.replace('_', '-')} has no effect without --fully-async; add it")
