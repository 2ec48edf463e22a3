"""How soon a student has its teacher's held-out accuracy on the quickstart task: taught by it, and with GRPO.

    python -m benchmarks.distillation --output FOLDER [--seeds 3] [--rollouts 24] [--teacher-rollouts 40] [--jobs 4]

The quickstart's model, fine-tuned once, is the start of all. The teacher is what GRPO makes of it in `--teacher-rollouts` with
a seed of its own. The student learns from the teacher's log-probs alone (every reward is 0), and GRPO from the rewards alone,
on the same set of prompts, with as many samples and steps in a rollout. GRPO runs twice: with the student's falling rate and
number of rollouts, and with the teacher's constant rate. FOLDER/curves.json holds the held-out accuracy of every run and of the
teacher, FOLDER/curves.png the means and ranges over the seeds. Prints, for every run, the first evaluation with the teacher's
accuracy less `--margin`. What is done is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import fmean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.learning_curves import METRIC, Curve, curves_of, over_seeds, prepare, run_method, with_values
from qwench.commands.quickstart import commands, run_command
from qwench.files import write_atomically

TEACHER = "teacher"
TEACHER_SEED = 7
EVALUATION = ["--n-samples-per-eval-prompt", "4"]
GRPO = ["--advantage-estimator", "grpo"]
CONSTANT = ["--lr", "1e-4"]
FALLING = ["--lr", "3e-4", "--lr-decay-style", "cosine", "--min-lr", "3e-5"]
TEACH = ["--use-opd", "--opd-type", "megatron", "--n-samples-per-prompt", "1", "--rollout-batch-size", "256"]
"""A teacher compares no responses to one prompt, so 256 prompts have one each where GRPO has 32 with 8."""


def main() -> None:
    """Make the teacher, run what is missing, and write the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of data, models, runs and results")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--rollouts", type=int, default=24, help="rollouts of GRPO at a constant rate (default: 24)")
    parser.add_argument("--short-rollouts", type=int, default=16, help="rollouts in which the rate falls (default: 16)")
    parser.add_argument("--teacher-rollouts", type=int, default=40, help="rollouts of GRPO for the teacher (default: 40)")
    parser.add_argument(
        "--margin", type=float, default=0.01, help="how far below the teacher counts as reached (default: 0.01)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    options = parser.parse_args()
    folder: Path = options.output
    prepare(folder, sft_rollouts=360)
    prompts = _prompts_without_reward(folder)
    teacher = _make_teacher(folder, rollouts=options.teacher_rollouts)
    accuracy = _accuracy_of(teacher, folder)
    teach = [*TEACH, "--prompt-data", str(prompts), "--opd-teacher-load", str(teacher)]
    kinds = {
        "distilled": ([*FALLING, *teach], options.short_rollouts),
        "grpo as the student": (FALLING, options.short_rollouts),
        "grpo": (CONSTANT, options.rollouts),
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed, (name, (flags, rollouts)) in product(range(options.seeds), kinds.items()):
            pool.submit(run_method, folder, name, [*GRPO, *flags, *EVALUATION], seed=seed, rollouts=rollouts, interval=2)
    curves = [curve for curve in curves_of(folder) if curve.method != TEACHER]
    rows = ",\n".join(json.dumps(asdict(curve)) for curve in curves)
    write_atomically(folder / "curves.json", f'{{"metric": "{METRIC}", "teacher": {accuracy}, "curves": [\n{rows}\n]}}\n')
    print(f"the teacher's accuracy: {accuracy:.3f}")
    for curve in curves:
        when = _when_reached(curve, accuracy - options.margin)
        print(f"{curve.method} {curve.seed}: {when}, at the end {curve.accuracy[-1]:.3f}")
    draw(curves, accuracy, folder / "curves.png")


def _when_reached(curve: Curve, accuracy: float) -> str:
    """Say at which evaluation the accuracy was there for the first time."""
    reached = (at for at, held in zip(curve.rollouts, curve.accuracy, strict=True) if held >= accuracy)
    return next((f"reached after {at} rollouts" for at in reached), "not reached")


def _prompts_without_reward(folder: Path) -> Path:
    """Write the prompts of GRPO again, each with a reward of 0, and return the file."""
    data = folder / "data"
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = (json.dumps({**row, "metadata": {"rm_type": "zero"}}) + "\n" for row in rows)
    write_atomically(data / "taught.jsonl", "".join(lines))
    return data / "taught.jsonl"


def _make_teacher(folder: Path, *, rollouts: int) -> Path:
    """Train the teacher unless it is there, and return its folder."""
    teacher = folder / "teacher-hf"
    if not (teacher / "config.json").is_file():
        export = ["--save", str(folder / "teacher"), "--save-hf", str(teacher), "--save-interval", str(rollouts)]
        run_method(folder, TEACHER, [*GRPO, *CONSTANT, *export], seed=TEACHER_SEED, rollouts=rollouts, interval=rollouts)
    if not (teacher / "config.json").is_file():
        raise SystemExit("without a teacher there is nothing to measure")
    return teacher


def _accuracy_of(teacher: Path, folder: Path) -> float:
    """Return the teacher's accuracy on the held-out problems, evaluated as before GRPO but with more responses."""
    evaluate = next(argv for _, argv, _ in commands(folder, seed=0) if argv[0] == "eval")
    found = folder / "eval-teacher"
    if not (found / "metrics.json").is_file():
        run_command(
            [
                *with_values(evaluate, {"--hf-checkpoint": teacher, "--eval-output": found}),
                *("--n-samples-per-eval-prompt", "16"),
            ]
        )
    return float(json.loads((found / "metrics.json").read_text(encoding="utf-8"))[METRIC])


def draw(curves: Sequence[Curve], teacher: float, picture: Path) -> None:
    """Write the mean and the range of each kind of run, and the teacher's accuracy."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(teacher, color="grey", linestyle="--", linewidth=1, label=f"teacher {teacher:.3f}")
    for name in dict.fromkeys(curve.method for curve in curves):
        own = [curve for curve in curves if curve.method == name]
        axes.fill_between(own[0].rollouts, over_seeds(own, min), over_seeds(own, max), alpha=0.25)
        axes.plot(own[0].rollouts, over_seeds(own, fmean), marker="o", markersize=3, label=f"{name} ({len(own)} seeds)")
    axes.set(ylim=(0.5, 1), xlabel="rollout of 256 samples", ylabel="held-out accuracy")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
