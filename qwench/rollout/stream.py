"""Rollouts one after the other, generated in turn with training or one ahead of it.

    rollouts_ahead 0:   take(0) learn publish | take(1) learn publish | ...
    rollouts_ahead 1:   take(0) learn ....... publish | take(1) learn ...
                             `- generates 1 -'             `- generates 2 -

`drained()` waits for the rollout that is being generated, so that one rollout is never sampled by two weight versions unless
`--partial-rollout` carries unfinished groups over. The state is that after the rollouts *taken*: what is generated ahead is
generated again after a resume.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from qwench.engines.fleet.pool import EnginePool
from qwench.errors import RewardError
from qwench.observability.dumps import save_rollout
from qwench.rewards.degenerate import degenerate_reason
from qwench.rollout.custom import MakeRollout
from qwench.rollout.feed import GroupFeed
from qwench.rollout.metrics import MetricOptions, describe_rollout
from qwench.rollout.tasks import cancel_and_wait
from qwench.samples import Json, Rollout

_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """How the stream runs."""

    num_rollouts: int
    """Of the whole run: nothing is generated ahead beyond the last."""
    rollouts_ahead: int = 0
    timeout_s: float | None = None
    """Deadline of one rollout. None: as long as it takes."""
    allow_degenerate_rewards: bool = False
    save_template: str | None = None
    """--save-debug-rollout-data"""
    metrics: MetricOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class _Started:
    rollout_id: int
    task: asyncio.Task[Rollout]


class RolloutStream:
    """Hands out scored rollouts; called from the main thread, generates on the engines' event loop."""

    def __init__(self, engines: EnginePool, make: MakeRollout, feed: GroupFeed, options: StreamOptions) -> None:
        assert options.rollouts_ahead in (0, 1), f"{options.rollouts_ahead} rollouts ahead"
        self._engines, self._make, self._feed, self._options = engines, make, feed, options
        self._ahead: _Started | None = None
        self._state = feed.state()
        self._check_rewards = not options.allow_degenerate_rewards

    def take(self, rollout_id: int) -> Rollout:
        """Return a rollout, generating it now if it was not ahead of time.

        Raises:
            EngineError: an engine failed, or the deadline passed.
            RewardError: a reward function failed, or the first rollout's rewards teach nothing.
        """
        started = self._ahead or self._start(rollout_id)
        assert started.rollout_id == rollout_id, f"rollout {rollout_id} taken, {started.rollout_id} generated"
        self._ahead = None
        rollout = self._engines.attend(_result(started.task), label=f"rollout {rollout_id}", timeout_s=self._options.timeout_s)
        self._state = self._feed.state()  # before the next rollout draws from the feed
        if self._options.save_template is not None:
            save_rollout(self._options.save_template, rollout)
        self._stop_if_degenerate(rollout)
        if self._options.rollouts_ahead and rollout_id + 1 < self._options.num_rollouts:
            self._ahead = self._start(rollout_id + 1)
        return rollout

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Wait until nothing is generated, and keep it so inside the block.

        Raises:
            QwenchError: what was generated ahead failed.
        """
        if self._ahead is not None:
            label = f"rollout {self._ahead.rollout_id}, which must end before weights are published,"
            self._engines.attend(_result(self._ahead.task), label=label, timeout_s=self._options.timeout_s)
        yield

    def state_dict(self) -> dict[str, Json]:
        """Return the data cursor and the unfinished groups after the rollouts taken so far, JSON-compatible."""
        return self._state.to_record()

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a saved state; only before the first `take`."""
        assert self._ahead is None, "a rollout is under way"
        self._feed.load_record(state)
        self._state = self._feed.state()
        self._check_rewards = False  # a run that was saved has passed it

    def close(self) -> None:
        """End what is generated ahead."""
        if self._ahead is not None:
            started, self._ahead = self._ahead, None
            label = f"end of rollout {started.rollout_id}"
            self._engines.run(cancel_and_wait([started.task]), label=label, timeout_s=_END_TIMEOUT_S)

    def _start(self, rollout_id: int) -> _Started:
        async def spawn() -> asyncio.Task[Rollout]:
            return asyncio.create_task(self._generate(rollout_id), name=f"rollout {rollout_id}")

        task = self._engines.run(spawn(), label=f"start of rollout {rollout_id}", timeout_s=_START_TIMEOUT_S)
        return _Started(rollout_id=rollout_id, task=task)

    async def _generate(self, rollout_id: int) -> Rollout:
        started_at = time.monotonic()
        rollout = await self._make(rollout_id)
        seconds = time.monotonic() - started_at
        return rollout.with_metrics(describe_rollout(rollout.groups, seconds=seconds, options=self._options.metrics))

    def _stop_if_degenerate(self, rollout: Rollout) -> None:
        """Look at the first rollout of a run: rewards that cannot rise are found before hours are spent on them."""
        if not self._check_rewards:
            return
        self._check_rewards = False
        reason = degenerate_reason([sample.verdict for sample in rollout.samples if sample.verdict is not None])
        if reason is not None:
            raise RewardError(f"rollout {rollout.rollout_id}: {reason}")


async def _result(task: asyncio.Task[Rollout]) -> Rollout:
    return await task
