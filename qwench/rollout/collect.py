"""Collect one rollout: keep enough groups in flight, filter what finishes, stop when there are enough.

    while accepted < wanted:
        submit --over-sampling-batch-size groups while accepted + in flight < wanted          (one round)
        take groups as they finish; the filter may drop some
    end the surplus: kept for the next rollout with --partial-rollout, else discarded

A deterministic run takes a round's groups in order, and only when all have finished. So the timing of engines and graders does
not decide which groups are trained on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from qwench.config.sections.rollout import RolloutConfig
from qwench.data.curriculum import Curriculum
from qwench.errors import QwenchError
from qwench.observability.console import Console, Progress
from qwench.rollout.buffer import GroupBuffer
from qwench.rollout.early_scores import EarlyScores
from qwench.rollout.functions import RolloutFunctions
from qwench.rollout.groups import GroupRunner, cancel_and_wait
from qwench.rollout.selection import Selection, Tally, reward_shares
from qwench.samples import Group, Rollout

_logger = logging.getLogger(__name__)


class Collector:
    """Makes rollouts of the buffer's groups."""

    def __init__(
        self,
        runner: GroupRunner,
        buffer: GroupBuffer,
        rollout: RolloutConfig,
        functions: RolloutFunctions,
        *,
        console: Console,
        deterministic: bool,
        curriculum: Curriculum | None,
        early: EarlyScores | None = None,
    ) -> None:
        """Keep what every rollout needs.

        Args:
            early: is given each accepted group at once.
        """
        assert rollout.rollout_batch_size is not None, "config.verb_checks requires --rollout-batch-size"
        self._runner, self._buffer, self._console = runner, buffer, console
        self._selection = Selection(functions, curriculum)
        self._num_groups = rollout.rollout_batch_size
        self._over_sampling = rollout.over_sampling_batch_size or self._num_groups
        self._max_rounds = rollout.dynamic_sampling_max_rounds
        self._partial_rollout, self._deterministic = rollout.partial_rollout, deterministic
        self._early = early

    async def collect(self, rollout_id: int) -> Rollout:
        """Generate, grade and filter until there are enough groups.

        Raises:
            QwenchError: the engine, a reward or a filter failed; nothing of the rollout is left running.
        """
        tally = Tally()
        pending: set[asyncio.Task[Group]] = set()
        try:
            with self._console.progress(f"generate rollout {rollout_id}", total=self._num_groups) as progress:
                while len(tally.accepted) < self._num_groups:
                    self._submit(rollout_id, tally, pending)
                    if not pending:
                        self._use_rejected(rollout_id, tally)
                        break
                    done = await self._wait(pending)
                    self._judge(done, tally, progress, num_pending=len(pending))
            tally.surplus += await self._runner.abort(pending)
        finally:
            await cancel_and_wait(pending)
        return self._finish(rollout_id, tally)

    def _submit(self, rollout_id: int, tally: Tally, pending: set[asyncio.Task[Group]]) -> None:
        """Start groups while too few are accepted or in flight, and rounds are left."""
        while len(tally.accepted) + len(pending) < self._num_groups and tally.rounds < self._max_rounds:
            tally.rounds += 1
            for group in self._buffer.next_groups(self._over_sampling):
                pending.add(asyncio.create_task(self._runner.run(group, rollout_id=rollout_id)))

    async def _wait(self, pending: set[asyncio.Task[Group]]) -> list[Group]:
        """Wait for some group (deterministic: all) and return the finished groups in order; raise the first error."""
        until = asyncio.FIRST_EXCEPTION if self._deterministic else asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait(pending, return_when=until)
        groups = [task.result() for task in done]
        pending -= done
        for group in groups:
            self._buffer.update(group)
        return sorted(groups, key=lambda group: group.group_id)

    def _judge(self, groups: Sequence[Group], tally: Tally, progress: Progress, *, num_pending: int) -> None:
        """Sort finished groups by outcome; what comes when there are enough is surplus."""
        for position, group in enumerate(groups):
            others = len(tally.accepted) + len(groups) - position - 1 + num_pending
            if len(tally.accepted) == self._num_groups:
                tally.surplus.append(group)
            elif self._selection.judge(group, tally, is_needed=others < self._num_groups):
                progress.advance(1)
                if self._early is not None:
                    self._early.add(group)

    def _use_rejected(self, rollout_id: int, tally: Tally) -> None:
        """Fill the rollout with rejected groups, the oldest first. Without them it would never end on data without a signal."""
        missing = self._num_groups - len(tally.accepted)
        if missing > len(tally.rejected):
            raise QwenchError(
                f"rollout {rollout_id}: {len(tally.unusable)} groups came back aborted in {tally.rounds} rounds, so that "
                f"{missing} are missing; look at the engine's log, or at what the custom generate function aborts."
            )
        zeros, ones = reward_shares(tally.judged)
        _logger.warning(
            f"rollout {rollout_id}: after {tally.rounds} rounds the dynamic filter kept only {len(tally.accepted)} of "
            f"{self._num_groups} groups; using {missing} rejected ones. All rewards 0 in {zeros:.0%} of the groups, "
            f"all 1 in {ones:.0%}: the task is too hard or too easy for this policy."
        )
        tally.rejected.sort(key=lambda group: group.group_id)
        tally.accepted += tally.rejected[:missing]
        del tally.rejected[:missing]

    def _finish(self, rollout_id: int, tally: Tally) -> Rollout:
        """Keep the surplus, and make the rollout."""
        if self._partial_rollout:
            self._buffer.put_back(sorted(tally.surplus, key=lambda group: group.group_id))
        return self._selection.finish(rollout_id, tally)
