"""`--stop-metric NAME>=X`: a run that is good enough ends before its last rollout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from qwench.errors import ConfigError

_FORM = re.compile(r"\s*(\S+?)\s*(>=|<=)\s*(\S+)\s*")


@dataclass(frozen=True, kw_only=True, slots=True)
class StopMetric:
    """A bound that a logged metric reaches."""

    name: str
    is_lower_bound: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> StopMetric:
        """Read `eval/aime>=0.6` or `rollout/kl<=0.1`.

        Raises:
            ConfigError: it is neither.
        """
        found = _FORM.fullmatch(text)
        try:
            bound = float(found[3]) if found else float("nan")
        except ValueError:
            bound = float("nan")
        if found is None or not isfinite(bound):
            raise ConfigError(
                "--stop-metric must be 'NAME>=NUMBER' or 'NAME<=NUMBER' in quotes, since a shell takes > and < for itself; "
                f"for example 'eval/aime>=0.6'; got {text!r}"
            )
        return cls(name=found[1], is_lower_bound=found[2] == ">=", bound=bound)

    def is_met(self, metrics: Mapping[str, float]) -> bool:
        """Tell whether the metric is among these and reaches the bound; NaN reaches none."""
        value = metrics.get(self.name)
        if value is None:
            return False
        return value >= self.bound if self.is_lower_bound else value <= self.bound


class StopCheck:
    """Tells whether a run is good enough, and whether its metric was ever logged."""

    def __init__(self, text: str | None) -> None:
        """Take the value of --stop-metric. None: no metric ends the run."""
        self.text = text
        self._metric = None if text is None else StopMetric.parse(text)
        self.was_logged = text is None

    def is_met(self, metrics: Mapping[str, float]) -> bool:
        """Tell whether these metrics, which are logged, end the run."""
        if self._metric is None:
            return False
        self.was_logged |= self._metric.name in metrics
        return self._metric.is_met(metrics)
