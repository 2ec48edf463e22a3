"""Steps that taught nothing: why, said once for a row of them, and again after ten, a hundred and so on."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from qwench.algorithms.columns import RolloutBatch
from qwench.training.rollout_metrics import count_scored

_logger = logging.getLogger(__name__)


class IdleSteps:
    """The row of steps so far that taught nothing for one reason. A run that has converged has nothing but such steps."""

    def __init__(self) -> None:
        self._problem: str | None = None
        self._length = 0

    def note(self, title: str, metrics: Mapping[str, float], step: RolloutBatch) -> None:
        """Take the next step, and warn if it begins a row, or if the length of the row is a power of ten."""
        problem = why_it_taught_nothing(metrics, step)
        before, self._length = self._length, self._length + 1
        if problem != self._problem:
            self._problem, self._length = problem, 1
        if problem is not None:
            if str(self._length).strip("0") == "1":
                also = f" ({before} steps before it, too)" if self._length > 1 else ""
                _logger.warning("%s %s%s", title, problem, also)
        elif self._length == 1 and before > 1:
            _logger.info("%s teaches again, after %d steps that taught nothing", title, before)


def why_it_taught_nothing(metrics: Mapping[str, float], step: RolloutBatch) -> str | None:
    """Return why a step taught nothing; None: it did."""
    if not count_scored(step):
        return "has no trained token: nothing was sampled, or all of it is masked; the step changed nothing"
    if step.advantages is None or metrics["train/grad_norm"] != 0:
        return None
    if any(bool(values[mask].any()) for values, mask in zip(step.advantages, step.loss_mask, strict=True)):
        return "has trained tokens with unequal rewards and gradient 0: the policy is dead, often after too high a --lr"
    return (
        "teaches nothing: every advantage is 0, as where the responses to each prompt have equal rewards; "
        "other prompts or more responses to each may differ"
    )
