"""Curves of a run as a PNG, read from its metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from qwench.observability.metrics import Axis

_CURVES_PER_ROW = 2
_PANEL_INCHES = (5.5, 3.2)


def read_curve(metrics_file: Path, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one metric, in the order they were logged; values that were not finite are left out."""
    steps, values = [], []
    for line in metrics_file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get(name) is not None:
            steps.append(next(record[axis.value] for axis in Axis if axis.value in record))
            values.append(record[name])
    return steps, values


def plot_curves(metrics_file: Path, picture: Path, names: Sequence[str]) -> Path:
    """Draw one panel for each metric over its own axis and write the picture; a metric never logged gets an empty panel."""
    num_rows = -(-len(names) // _CURVES_PER_ROW)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * min(len(names), _CURVES_PER_ROW), height * num_rows), layout="constrained")
    for position, name in enumerate(names, start=1):
        panel = figure.add_subplot(num_rows, min(len(names), _CURVES_PER_ROW), position)
        steps, values = read_curve(metrics_file, name)
        panel.plot(steps, values, marker="o", markersize=3)
        panel.set_title(name)
        panel.set_xlabel("optimizer step" if name.startswith("train/") else "rollout")
        panel.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    return picture
