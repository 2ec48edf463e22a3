"""Draw the curves of a run and print its table: `python plot.py OUTPUT_DIR`.

Reads metrics.jsonl of the stages sft and grpo and the graded responses of the evaluations; writes curves.png and results.md.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qwench.observability.plots import read_curve

TITLES = {"base": "as it comes", "sft": "after SFT", "grpo": "after GRPO"}
WAYS = {"greedy": "greedy, 1 answer", "sampled": "temperature 1, 8 answers"}


def solved_shares(output: Path, stage: str, way: str) -> list[float]:
    """Return the share of right answers to each test problem, in order; none where the evaluation was left out."""
    if not (output / f"eval-{stage}-{way}").is_dir():
        return []
    rewards = defaultdict(list)
    with (output / f"eval-{stage}-{way}" / "gsm8k.jsonl").open(encoding="utf-8") as answers:
        for sample in map(json.loads, answers):
            rewards[sample["group_id"]].append(sample["reward"])
    return [fmean(rewards[problem]) for problem in sorted(rewards)]


def standard_error(shares: Sequence[float]) -> float:
    """Return the standard error of the mean over problems: answers to one problem are not independent, problems are."""
    return stdev(shares) / sqrt(len(shares))


def table(output: Path) -> str:
    """Return the results as Markdown, and the gain of GRPO in units of its standard error, problem by problem."""
    ways = [way for way in WAYS if (output / f"eval-grpo-{way}").is_dir()]
    lines = ["| checkpoint | " + " | ".join(WAYS[way] for way in ways) + " |", "| --- |" + " --- |" * len(ways)]
    for stage, title in TITLES.items():
        cells = [solved_shares(output, stage, way) for way in ways]
        shown = [f"{100 * fmean(cell):.2f} +- {100 * standard_error(cell):.2f} %" if cell else "-" for cell in cells]
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(shown) + " |")
    lines.append("")
    for way in ways:
        after, before = solved_shares(output, "grpo", way), solved_shares(output, "sft", way)
        if not before:
            continue
        gains = [a - b for a, b in zip(after, before, strict=True)]
        gain, error = fmean(gains), standard_error(gains)
        times = f"{gain / error:.1f}" if error else "undefined"
        change = f"{100 * gain:+.2f} points, {times} times the standard error of the difference."
        lines.append(f"GRPO over SFT, {WAYS[way]}: {change}")
    return "\n".join(lines) + "\n"


def draw(output: Path) -> Path:
    """Draw the training loss of SFT, and reward and held-out accuracy of GRPO."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, learning = figure.subplots(1, 2)
    loss.plot(*read_curve(output / "sft" / "metrics.jsonl", "train/loss"))
    loss.set(title="SFT: loss per token", xlabel="optimizer step")
    metrics = output / "grpo" / "metrics.jsonl"
    learning.plot(*read_curve(metrics, "rollout/reward_reason/exact"), label="training prompts, sampled")
    after = solved_shares(output, "grpo", "greedy")
    evaluated, solved = read_curve(metrics, "eval/gsm8k")
    evaluated.append(1 + read_curve(metrics, "rollout/raw_reward")[0][-1])
    solved.append(fmean(after))
    errors = [sqrt(share * (1 - share) / len(after)) for share in solved]
    learning.errorbar(evaluated, solved, yerr=errors, fmt="o-", capsize=3, label="test set, greedy")
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
    arguments = parser.parse_args()
    if not (arguments.output / "eval-grpo-greedy").is_dir():
        raise SystemExit(f"{arguments.output} has no eval-grpo-greedy: the stage eval_grpo comes first")
    results = table(arguments.output)
    (arguments.output / "results.md").write_text(results, encoding="utf-8")
    print(results + f"\ncurves: {draw(arguments.output)}")


if __name__ == "__main__":
    main()
