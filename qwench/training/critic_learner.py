"""The critic on ranks of its own: values, targets and steps there, while the policy's ranks compute theirs.

    learn:   values -> exchange -> targets -> steps       beside the same call on the policy's ranks (`learner.Learner`)

Its ranks get every call that the policy's ranks get. What concerns the policy alone does nothing here, and as no engine uses
the critic's devices, the critic never leaves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from qwench.algorithms.method import Method
from qwench.config.plan import RunPlan
from qwench.observability.console import Console
from qwench.observability.timing import PhaseTimer
from qwench.samples import Rollout, Sample
from qwench.training.critic import load_critic, save_critic, train_critic
from qwench.training.critic_link import CriticLink
from qwench.training.learner import Learned, ScoringModel
from qwench.training.memory_probe import MemoryProbe
from qwench.training.passes import Passes
from qwench.training.rollout_columns import RolloutColumns
from qwench.training.trainer import Trainer
from qwench.weights.plan import PublicationPlan
from qwench.wire.addresses import EngineAddress
from qwench.wire.portions import WeightBucket, WeightPart


class CriticState:
    """`training.state.TrainingState` of the critic's own ranks. Methods are collective."""

    def __init__(self, critic: Trainer) -> None:
        self.critic = critic

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write the critic under the checkpoint in `folder`."""
        save_critic(self.critic, folder, with_optimizer=with_optimizer)

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read the critic of the checkpoint in `folder`; without one, that from the start stays."""
        load_critic(self.critic, folder, weights_only=weights_only)

    def weights(self, *, bucket_bytes: int, part: WeightPart = "merged") -> Iterator[WeightBucket]:
        """Return no buckets: only the policy is published."""
        return iter(())

    def publish(self, addresses: Sequence[EngineAddress], version: int, plan: PublicationPlan) -> None:
        """Do nothing: only the policy is published."""

    def probe_memory(self, probe: MemoryProbe) -> str:
        """Run the critic's probe, and return what it took."""
        return f"critic's {(probe.of_critic or probe).run(self.critic, None)}"

    def release_cache(self) -> None:
        """Do nothing: no engine needs memory of these devices."""

    def sleep(self) -> None:
        """Do nothing: no engine needs memory of these devices."""

    def wake(self) -> None:
        """Do nothing: the critic never sleeps."""

    def close(self) -> None:
        """Do nothing."""


class CriticLearner:
    """See the module docstring. Methods are collective."""

    def __init__(
        self,
        critic: Trainer,
        method: Method,
        columns: RolloutColumns,
        link: CriticLink,
        *,
        plan: RunPlan,
        temperature: float,
        timer: PhaseTimer,
        console: Console,
        forgets_moments: bool,
    ) -> None:
        """Keep what every rollout needs; see `Learner`."""
        self.state = CriticState(critic)
        self._method, self._columns, self._link = method, columns, link
        self._passes = Passes(critic, plan, temperature=temperature, console=console)
        self._timer = timer
        self._forgets_moments = forgets_moments

    def learn(self, rollout: Rollout) -> Learned:
        """Take the critic's steps of one rollout, and return their metrics.

        Raises:
            TrainingError: the rollout does not fill a step, or a loss or gradient norm is not finite.
        """
        rollout, batch, plan = self._columns.planned(rollout)
        with self._timer.phase("critic_values"):
            batch = batch.with_columns(values=self._passes.scores(self.state.critic, batch))
        batch = self._columns.with_targets(self._link.exchange(batch), rollout.rollout_id)
        with self._timer.phase("critic_train"):
            weighed = [self._columns.weighed(step) for step in plan.batches(batch)]
            steps = train_critic(self.state.critic, weighed, self._method, self._passes, forgets_moments=self._forgets_moments)
        return Learned(metrics={}, steps=steps)

    def log_probs(self, samples: Sequence[Sample], temperature: float, model: ScoringModel = "policy") -> list[list[float]]:
        """Return nothing: the policy scores."""
        return []
