"""Draw held-out accuracy and training reward of several seeds: `python plot.py PICTURE METRICS_JSONL ...`."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qwench.observability.plots import read_curve


def draw(picture: Path, metrics_files: list[Path]) -> None:
    """Write one panel for the training prompts and one for the held-out set, a line for each seed."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, name, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("rollout/raw_reward", "eval/held_out"),
        ("training prompts", "held-out problems"),
        strict=True,
    ):
        for seed, metrics in enumerate(metrics_files):
            panel.plot(*read_curve(metrics, name), marker="o", markersize=3, label=f"seed {seed}")
        panel.set(title=f"GRPO: {title}, share solved", xlabel="rollout", ylim=(0, 1))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("metrics", type=Path, nargs="+")
    arguments = parser.parse_args()
    draw(arguments.picture, arguments.metrics)
