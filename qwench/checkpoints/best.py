"""The best checkpoint of a run by one metric of its evaluations, kept until a better one comes (--keep-best).

best_checkpoint.json    {"iteration": 40, "metric": "eval/held_out/loss", "value": 0.41}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from qwench.errors import CheckpointError
from qwench.files import write_atomically

_FILE = "best_checkpoint.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion:
    """What makes a checkpoint the best one."""

    metric: str
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best checkpoint so far."""

    iteration: int
    metric: str
    value: float

    def write(self, root: Path) -> None:
        """Record it in the folder of --save."""
        write_atomically(root / _FILE, json.dumps(asdict(self)) + "\n")


def read_best(root: Path) -> Best | None:
    """Return the best checkpoint under the folder of --save; None: none is recorded.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = root / _FILE
    if not path.is_file():
        return None
    try:
        return Best(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it, and the next evaluation is the best one.") from error


def improvement(best: Best | None, criterion: Criterion, metrics: Mapping[str, float], *, iteration: int) -> Best | None:
    """Return the new best if an evaluation of the weights after `iteration` rollouts is one.

    An equal value is none, and so is one that is not finite or was not measured.
    """
    value = metrics.get(criterion.metric, math.nan)
    if not math.isfinite(value):
        return None
    sign = 1 if criterion.higher_is_better else -1
    if best is not None and best.metric == criterion.metric and sign * (value - best.value) <= 0:
        return None
    return Best(iteration=iteration, metric=criterion.metric, value=value)
