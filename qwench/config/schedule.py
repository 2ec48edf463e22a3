"""What is due after which rollout."""

from __future__ import annotations

from dataclasses import dataclass

from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The intervals of a run; an epoch that ends is the end of an interval too."""

    rollout: RolloutConfig
    evaluation: EvalConfig
    checkpoint: CheckpointConfig
    rollouts_per_epoch: int | None = None
    """None: not known before the data set is read, or there are no epochs."""
    exits_after: int | None = None
    """Rollouts of one start (--debug-exit-after-rollout). None: all that are left."""

    @property
    def num_rollout(self) -> int:
        """Return the number of rollouts of the run; with --num-epoch, once the size of the data set is known."""
        if self.rollout.num_rollout is not None:
            return self.rollout.num_rollout
        assert self.rollout.num_epoch is not None, "checks ask for one of the two"
        assert self.rollouts_per_epoch is not None, "the data set is read first"
        return self.rollout.num_epoch * self.rollouts_per_epoch

    def end(self, first: int) -> int:
        """Return the rollout before which a start that begins with rollout `first` ends."""
        return self.num_rollout if self.exits_after is None else min(self.num_rollout, first + self.exits_after)

    def eval_due(self, rollout_id: int) -> bool:
        """Tell whether to evaluate the weights that this rollout starts from (or, at the end, that no rollout follows)."""
        interval = self.evaluation.eval_interval
        if rollout_id == 0:
            return self.evaluation.has_sets and not self.evaluation.skip_eval_before_train
        if interval is None:
            return self.evaluation.has_sets and rollout_id == self.num_rollout
        return self._ends(rollout_id - 1, interval)

    def is_out_of_patience(self, rollout_id: int, *, best: int) -> bool:
        """Tell whether --early-stopping-patience ends the run with the evaluation of these weights.

        Args:
            best: rollouts that the best weights so far have learned from; 0 where none were measured.
        """
        patience = self.checkpoint.early_stopping_patience
        if patience is None or not self.eval_due(rollout_id):
            return False
        return sum(self.eval_due(later) for later in range(best + 1, rollout_id + 1)) >= patience

    def save_due(self, rollout_id: int, *, ends: bool = False) -> bool:
        """Tell whether to save after this rollout; the last one always is, and one that `ends` the run early."""
        if self.checkpoint.save is None:
            return False
        is_last, interval = ends or rollout_id + 1 == self.num_rollout, self.checkpoint.save_interval
        return is_last or (interval is not None and self._ends(rollout_id, interval))

    def publish_due(self, rollout_id: int) -> bool:
        """Tell whether the engines get the weights after this rollout; before an evaluation and at the end they always do."""
        is_last = rollout_id + 1 == self.num_rollout
        return is_last or (rollout_id + 1) % self.rollout.update_weights_interval == 0 or self.eval_due(rollout_id + 1)

    def _ends(self, rollout_id: int, interval: int) -> bool:
        """Tell whether this rollout ends an interval or an epoch."""
        epoch_ends = self.rollouts_per_epoch is not None and (rollout_id + 1) % self.rollouts_per_epoch == 0
        return (rollout_id + 1) % interval == 0 or epoch_ends
