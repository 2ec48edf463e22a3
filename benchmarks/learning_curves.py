"""Learning curves of every --advantage-estimator on the quickstart task, with bands over seeds.

    python benchmarks/learning_curves.py --output FOLDER [--method grpo --method rloo] [--seeds 3] [--rollouts 24] [--jobs 8]
                                         [--own "mine=--custom-advantage-function-path ./mine.py:advantages"]

One tiny model is fine-tuned once (`qwench quickstart`). Every method then learns from it with the same data, budget and flags;
only the flags that a method requires differ, and those of SETTINGS, which its panel names. FOLDER/curves.json holds the
held-out accuracy of every run, and FOLDER/curves.png shows each method's mean and range over the seeds, beside GRPO's mean if
it ran. `--own NAME=FLAGS` adds a method of yours. A run that is done is not run again, and the picture holds all that FOLDER
has, so methods can be added later. A run that fails costs itself alone. All 18 methods with 3 seeds are 54 runs of about two
minutes on two cores; `--jobs` runs several at once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qwench.commands.quickstart import commands, run_command, write_data
from qwench.estimators import METHODS, estimator_names
from qwench.files import write_atomically
from qwench.observability.plots import read_curve

METRIC = "eval/held_out"
REFERENCE = "grpo"
REQUIRED: Mapping[str, tuple[str, ...]] = {"gdpo": ("--rm-type", "deepscaler,f1", "--reward-weights", "1,0.1")}
"""Flags without which a method does not run; those of `MethodFacts` are added."""
SETTINGS: Mapping[str, Mapping[str, str]] = {
    **{name: {"--lr": "1e-4"} for name in ("cispo", "gpg", "gspo", "kl_cov", "sapo")},
    "passk": {"--lr": "1e-4", "--n-samples-per-prompt": "2", "--rollout-batch-size": "128"},
}
"""Flags that replace the quickstart's, by which a method does not learn or is unsteady: 256 samples in each rollout still."""
_REPLACED = ("--num-rollout", "--advantage-estimator", "--save", "--save-hf", "--save-interval", "--eval-interval",
             "--lr-decay-style", "--min-lr")  # fmt: skip
"""Flags of the quickstart that the runs do without or set themselves. The learning rate is constant unless a run names one."""
_CLIPS = ("--eps-clip", "--eps-clip-high")
"""Flags that a method without clipping refuses."""
_PANELS_PER_ROW = 4


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The held-out accuracy of one run."""

    method: str
    seed: int
    rollouts: list[int]
    accuracy: list[float]


def main() -> None:
    """Run what is missing, then write the numbers and the picture."""
    options = _options()
    folder: Path = options.output
    methods = {name: _flags_of(name) for name in options.method or ([] if options.own else estimator_names())}
    methods |= dict(_own_method(text) for text in options.own)
    prepare(folder, sft_rollouts=options.sft_rollouts)
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed in range(options.seeds):
            for name, flags in methods.items():
                pool.submit(
                    run_method, folder, name, flags, seed=seed, rollouts=options.rollouts, interval=options.eval_interval
                )
    curves = curves_of(folder)
    rows = ",\n".join(json.dumps(asdict(curve)) for curve in curves)
    content = f'{{"metric": "{METRIC}", "sft_rollouts": {options.sft_rollouts}, "curves": [\n{rows}\n]}}\n'
    write_atomically(folder / "curves.json", content)
    draw(curves, folder / "curves.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of data, model, runs and results")
    parser.add_argument(
        "--method", action="append", choices=estimator_names(), help="estimator to run. Without it and --own: all of them"
    )
    parser.add_argument(
        "--own", action="append", default=[], metavar="NAME=FLAGS", help="a method of yours, by its flags of qwench train"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: 3)")
    parser.add_argument("--rollouts", type=int, default=24, help="rollouts of each run (default: 24)")
    parser.add_argument("--eval-interval", type=int, default=3, help="rollouts between evaluations (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument(
        "--sft-rollouts",
        type=int,
        default=360,
        help="steps of the fine-tuning before, more than its warm-up of 20 (default: 360)",
    )
    return parser.parse_args()


def _flags_of(name: str) -> list[str]:
    whitens = ["--normalize-advantages"] if METHODS[name].requires_whitening else []
    replaced = (word for setting in SETTINGS.get(name, {}).items() for word in setting)
    return ["--advantage-estimator", name, *whitens, *REQUIRED.get(name, ()), *replaced]


def _own_method(text: str) -> tuple[str, list[str]]:
    name, found, flags = text.partition("=")
    if not found or not name or name in METHODS:
        raise SystemExit(f"--own must be NAME=FLAGS with a name of yours, got {text!r}")
    return name, shlex.split(flags)


def prepare(folder: Path, *, sft_rollouts: int) -> None:
    """Make the data, the model, and its fine-tuning, as the quickstart does."""
    if not (folder / "data" / "test.jsonl").is_file():
        write_data(folder / "data", seed=0, num_demos=64 * sft_rollouts, num_prompts=4_000, num_held_out=256)
    make_model, fine_tune = commands(folder, seed=0)[:2]
    for _, arguments, result in (make_model, fine_tune):
        if not result.exists():
            run_command(with_values(arguments, {"--num-rollout": sft_rollouts, "--save-interval": sft_rollouts}))


def run_method(folder: Path, method: str, flags: Sequence[str], *, seed: int, rollouts: int, interval: int) -> None:
    """Train with one method and seed, unless that is done, and say how it ended. What the run says is in its output.txt."""
    place = folder / "runs" / f"{method}-{seed}"
    arguments = next(argv for title, argv, _ in commands(folder, seed=0) if title.startswith("GRPO"))
    estimators = [name for flag, name in pairwise(flags) if flag == "--advantage-estimator"]
    clips = all(METHODS[name].clips for name in estimators if name in METHODS)
    left_out = _REPLACED if clips else _REPLACED + _CLIPS
    arguments = with_values(arguments, dict.fromkeys(left_out))
    settings = ["--num-rollout", rollouts, "--eval-interval", interval, "--seed", seed, "--rollout-seed", seed]
    settings += ["--lr-decay-style", "constant"]
    command = shlex.join([*arguments, *map(str, settings), *flags])
    done = place / "done"
    if done.is_file():
        if done.read_text() != command:
            print(f"{place} holds a run of other flags: {done.read_text()}\nname another method or --output", flush=True)
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with (place / "output.txt").open("w", encoding="utf-8") as output:
        words = [sys.executable, "-P", "-m", "qwench", *shlex.split(command), "--log-dir", str(place)]
        code = subprocess.run(words, check=False, stdout=output, stderr=subprocess.STDOUT).returncode
    if code == 0:
        done.write_text(command)
    print(f"{place.name}: {'done' if code == 0 else f'failed with exit code {code}, see {place}/output.txt'}", flush=True)


def curves_of(folder: Path) -> list[Curve]:
    """Read all runs that are done, sorted by method and seed."""
    curves = []
    for done in sorted(folder.glob("runs/*/done")):
        method, _, seed = done.parent.name.rpartition("-")
        steps, values = read_curve(done.parent / "metrics.jsonl", METRIC)
        curves.append(Curve(method=method, seed=int(seed), rollouts=steps, accuracy=values))
    return curves


def with_values(arguments: Sequence[str], values: Mapping[str, object]) -> list[str]:
    """Replace the value of flags that take one; None leaves the flag out."""
    changed, words = list[str](), iter(arguments)
    for word in words:
        if word not in values:
            changed.append(word)
            continue
        next(words)
        if values[word] is not None:
            changed += [word, str(values[word])]
    return changed


def draw(curves: Sequence[Curve], picture: Path) -> None:
    """Write a panel for each method: the mean over its seeds, their range, and the mean of GRPO."""
    names = list(dict.fromkeys(curve.method for curve in curves))
    num_rows = -(-len(names) // _PANELS_PER_ROW)
    figure = Figure(figsize=(3.4 * min(len(names), _PANELS_PER_ROW), 2.6 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    most = max(Counter(curve.method for curve in curves).values(), default=0)
    reference = [curve for curve in curves if curve.method == REFERENCE]
    for position, name in enumerate(names, start=1):
        panel = figure.add_subplot(num_rows, min(len(names), _PANELS_PER_ROW), position)
        own = [curve for curve in curves if curve.method == name]
        if reference and name != REFERENCE:
            panel.plot(reference[0].rollouts, over_seeds(reference, fmean), color="grey", linestyle="--", linewidth=1)
        panel.fill_between(own[0].rollouts, over_seeds(own, min), over_seeds(own, max), alpha=0.25)
        panel.plot(own[0].rollouts, over_seeds(own, fmean), marker="o", markersize=2.5)
        panel.set_ylim(0, 1)
        settings = [f"{flag.removeprefix('--')} {value}" for flag, value in SETTINGS.get(name, {}).items()][:2]
        settings += [f"(seeds: {len(own)})"] if len(own) < most else []
        panel.set_title("  ".join([f"{name}  {over_seeds(own, fmean)[-1]:.2f}", *settings]), fontsize=8 if settings else 9)
        panel.grid(alpha=0.3)
    figure.supxlabel("rollout")
    figure.supylabel("held-out accuracy")
    figure.savefig(picture, dpi=120)


def over_seeds(curves: Sequence[Curve], statistic: Callable[[Sequence[float]], float]) -> list[float]:
    """Return a statistic over the seeds at each evaluation."""
    return [float(statistic(values)) for values in zip(*(curve.accuracy for curve in curves), strict=True)]


if __name__ == "__main__":
    main()
