"""Which prompts are drawn: those whose pass rate lies in a band (--curriculum-band LOW HIGH).

    row -> pass rate known? -> in the band -> drawn
                 |                 `- outside: left out, but drawn again after --curriculum-retry-epochs epochs
                 `- no: drawn, and measured when its group has finished

A measured rate replaces that of --curriculum-key. Groups that a filter rejects are measured too.
The rates are part of the data cursor's state, so that a resumed run draws the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwench.config.sections.data import DataConfig
from qwench.samples import Group, Json, Prompt


class Curriculum:
    """Knows the pass rate of each row, and admits rows to be drawn."""

    def __init__(self, section: DataConfig, prompts: Sequence[Prompt]) -> None:
        """Start with the rates of the column, where there is one."""
        self._low, self._high = section.curriculum_band
        self._passing, self._retry_epochs = section.curriculum_pass_reward, section.curriculum_retry_epochs
        self._rates = {row: prompt.pass_rate for row, prompt in enumerate(prompts) if prompt.pass_rate is not None}
        self._rows = {prompt.place: row for row, prompt in enumerate(prompts)}
        self._num_rows = len(prompts)
        self._left_out: dict[int, int] = {}
        """Row -> how many times it was left out since it was last drawn."""
        self._num_left_out = 0

    def admits(self, row: int) -> bool:
        """Tell whether the row is drawn now that it is its turn."""
        if self._is_in_band(row) or self._left_out.get(row, 0) >= self._retry_epochs:
            self._left_out.pop(row, None)
            return True
        self._left_out[row] = self._left_out.get(row, 0) + 1
        self._num_left_out += 1
        return False

    def measure(self, groups: Sequence[Group]) -> None:
        """Take the pass rates of finished groups; each execution counts once."""
        for group in groups:
            passed = {one.execution_id: one.reward for one in group.samples if one.graded and one.reward is not None}
            row = self._rows.get(group.samples[0].prompt.place)
            if passed and row is not None:
                self._rates[row] = sum(reward >= self._passing for reward in passed.values()) / len(passed)

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics of a rollout, and count what is left out from 0 again."""
        left_out, self._num_left_out = self._num_left_out, 0
        return {
            "rollout/curriculum/known": len(self._rates) / self._num_rows,
            "rollout/curriculum/in_band": sum(map(self._is_in_band, range(self._num_rows))) / self._num_rows,
            "rollout/curriculum/left_out": float(left_out),
        }

    def state_dict(self) -> dict[str, Json]:
        """Return the rates and what was left out, JSON-compatible."""
        return {"rates": [*self._rates.items()], "left_out": [*self._left_out.items()], "num_left_out": self._num_left_out}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Continue from what `state_dict` returned."""
        self._rates = {int(row): float(rate) for row, rate in state["rates"]}
        self._left_out = {int(row): int(count) for row, count in state["left_out"]}
        self._num_left_out = state["num_left_out"]

    def _is_in_band(self, row: int) -> bool:
        rate = self._rates.get(row)
        return rate is None or self._low <= rate <= self._high
