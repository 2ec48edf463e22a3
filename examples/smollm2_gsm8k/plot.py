"""Draw the curves of a run and print its table: `python plot.py OUTPUT_DIR [--num-problems 1319]`.

Reads metrics.jsonl of the stages sft and grpo and metrics.json of the three evaluations; writes curves.png and results.md.
"""

from __future__ import annotations

import argparse
import json
from math import sqrt
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qwench.observability.plots import read_curve

TITLES = {"base": "as it comes", "sft": "after SFT", "grpo": "after GRPO"}


def accuracies(output: Path) -> dict[str, float]:
    """Return the share of test problems solved by each checkpoint."""
    return {
        stage: json.loads((output / f"eval-{stage}" / "metrics.json").read_text(encoding="utf-8"))["eval/gsm8k"]
        for stage in TITLES
    }


def standard_error(accuracy: float, num_problems: int) -> float:
    """Return the standard error of a share of independent problems."""
    return sqrt(accuracy * (1 - accuracy) / num_problems)


def table(accuracy: dict[str, float], num_problems: int) -> str:
    """Return the results as Markdown, and the gain of GRPO in units of its standard error."""
    lines = ["| checkpoint | solved (greedy) | standard error |", "| --- | --- | --- |"]
    for stage, title in TITLES.items():
        lines.append(
            f"| {title} | {100 * accuracy[stage]:.2f} % | {100 * standard_error(accuracy[stage], num_problems):.2f} % |"
        )
    gain = accuracy["grpo"] - accuracy["sft"]
    error = sqrt(sum(standard_error(accuracy[stage], num_problems) ** 2 for stage in ("sft", "grpo")))
    times = f"{gain / error:.1f}" if error else "undefined"
    return (
        "\n".join(lines) + f"\n\nGRPO over SFT: {100 * gain:+.2f} points, {times} times the standard error of the difference.\n"
    )


def draw(output: Path, accuracy: dict[str, float], num_problems: int) -> Path:
    """Draw the training loss of SFT, and reward and held-out accuracy of GRPO."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, learning = figure.subplots(1, 2)
    loss.plot(*read_curve(output / "sft" / "metrics.jsonl", "train/loss"))
    loss.set(title="SFT: loss per token", xlabel="optimizer step")
    metrics = output / "grpo" / "metrics.jsonl"
    learning.plot(*read_curve(metrics, "rollout/raw_reward"), label="training prompts, temperature 1")
    evaluated, solved = read_curve(metrics, "eval/gsm8k")
    errors = [standard_error(share, num_problems) for share in solved]
    learning.errorbar(evaluated, solved, yerr=errors, fmt="o-", capsize=3, label="test set, greedy")
    learning.axhline(accuracy["sft"], color="gray", linestyle=":", label="test set after SFT")
    learning.set(title="GRPO: share of answers that are right", xlabel="rollout")
    learning.legend()
    for panel in (loss, learning):
        panel.grid(alpha=0.3)
    picture = output / "curves.png"
    figure.savefig(picture, dpi=120)
    return picture


def main() -> None:
    """Write the picture and the table, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--num-problems", type=int, default=1319)
    arguments = parser.parse_args()
    accuracy = accuracies(arguments.output)
    results = table(accuracy, arguments.num_problems)
    (arguments.output / "results.md").write_text(results, encoding="utf-8")
    print(results + f"\ncurves: {draw(arguments.output, accuracy, arguments.num_problems)}")


if __name__ == "__main__":
    main()
