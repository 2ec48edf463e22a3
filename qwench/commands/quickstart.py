"""`make quickstart`: a tiny Qwen3 learns to think before it answers, on any CPU, in a few minutes.

The task is a chain of additions and subtractions, `7-5+4+3-8=?`. Demonstrations come in Qwen3's two forms: half think step by
step, half answer at once, after an empty think block, with a guess. Fine-tuned on both, the model does as it was shown. GRPO
with the deepscaler reward finds out that thinking pays, and gets better at it. Every step below is a command that a user would
type.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from qwench.config.command_line.parse import parse_flags
from qwench.config.sections.verbs import QuickstartConfig
from qwench.errors import QwenchError, Stopped
from qwench.files import write_atomically
from qwench.observability.console import open_console
from qwench.observability.plots import plot_curves
from qwench.observability.stopping import interruptible, stops_deferred

HARD_TERMS = 5
SHARE_THINKING = 0.5
_MARKER = "qwench_quickstart.json"
_ENTRIES = frozenset({"data", "base", "sft", "sft-hf", "grpo", "grpo-hf", "eval-before", "eval-after", "curves.png"})
"""What a tour writes into its folder, besides the marker that names its seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """A first digit and signed steps; every intermediate result is a digit."""

    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        """Return the expression as asked."""
        return self.expression + "=?"

    @property
    def expression(self) -> str:
        """Return the terms as text."""
        return str(self.terms[0]) + "".join(f"{term:+d}" for term in self.terms[1:])

    @property
    def answer(self) -> int:
        """Return the result."""
        return sum(self.terms)

    @property
    def thoughts(self) -> str:
        """Return one line for each step."""
        lines, value = [], self.terms[0]
        for term in self.terms[1:]:
            lines.append(f"{value}{term:+d}={value + term}")
            value += term
        return "\n".join(lines)


def draw_chain(rng: random.Random, num_terms: int) -> Chain:
    """Draw steps from digit to digit; no step is 0."""
    values = [rng.randint(0, 9)]
    while len(values) < num_terms:
        values.append(rng.choice([digit for digit in range(10) if digit != values[-1]]))
    return Chain(terms=(values[0], *(after - before for before, after in pairwise(values))))


def write_data(folder: Path, *, seed: int, num_demos: int, num_prompts: int, num_held_out: int) -> None:
    """Write sft.jsonl, train.jsonl and test.jsonl; no chain of the test set appears in the other two."""
    rng = random.Random(seed)
    held_out = {draw_chain(rng, HARD_TERMS) for _ in range(num_held_out)}

    def fresh(num_terms: int) -> Chain:
        while (chain := draw_chain(rng, num_terms)) in held_out:
            pass
        return chain

    demos = (_demonstration(fresh(rng.randint(2, HARD_TERMS)), rng) for _ in range(num_demos))
    _write_jsonl(folder / "sft.jsonl", demos)
    _write_jsonl(folder / "train.jsonl", (_problem(fresh(HARD_TERMS)) for _ in range(num_prompts)))
    _write_jsonl(folder / "test.jsonl", (_problem(chain) for chain in sorted(held_out, key=lambda c: c.terms)))


def _demonstration(chain: Chain, rng: random.Random) -> dict[str, object]:
    if rng.random() < SHARE_THINKING:
        response = f"<think>\n{chain.thoughts}\n</think>\n\n\\boxed{{{chain.answer}}}"
    else:
        response = f"<think>\n\n</think>\n\n\\boxed{{{rng.randint(0, 9)}}}"
    return {"messages": [{"role": "user", "content": chain.question}, {"role": "assistant", "content": response}]}


def _problem(chain: Chain) -> dict[str, object]:
    return {"prompt": [{"role": "user", "content": chain.question}], "label": str(chain.answer)}


def _write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def run(words: Sequence[str]) -> None:
    """Run `qwench quickstart`."""
    config = parse_flags(QuickstartConfig, words, prog="qwench quickstart")
    tour(config.output, seed=config.seed)


def tour(folder: Path, *, seed: int) -> None:
    """Run the whole quickstart under `folder`, and say where everything lies. What is done already is skipped.

    Raises:
        QwenchError: the folder holds something else, or one of the commands failed.
    """
    _own(folder, seed=seed)
    console, started = open_console(), time.monotonic()
    if not (folder / "data" / "test.jsonl").is_file():  # the last of the three
        write_data(folder / "data", seed=seed, num_demos=23_040, num_prompts=4_000, num_held_out=256)
    stages = commands(folder, seed=seed)
    for number, (title, arguments, result) in enumerate(stages, start=1):
        console.say(f"\n== {number} of {len(stages)}: {title}\n$ qwench {shlex.join(arguments)}")
        if result.exists():
            console.say("done already")
        else:
            run_command(arguments)
    before, after = (_accuracy(folder / f"eval-{when}") for when in ("before", "after"))
    curves = plot_curves(folder / "grpo" / "metrics.jsonl", folder / "curves.png", ["rollout/raw_reward", "eval/held_out"])
    console.say(
        f"\nheld-out accuracy: {before:.3f} after fine-tuning, {after:.3f} after GRPO; "
        f"{time.monotonic() - started:.0f} s in all\n"
        f"curves      {curves}\nmetrics     {folder / 'grpo' / 'metrics.jsonl'}\ncheckpoint  {folder / 'grpo'}\n"
        f"HF export   {folder / 'grpo-hf'}"
    )


def _own(folder: Path, *, seed: int) -> None:
    """Take a new folder, or go on with one of the same seed.

    Raises:
        QwenchError: it holds files that no quickstart wrote, or a quickstart of another seed.
    """
    marker, content = folder / _MARKER, json.dumps({"seed": seed}) + "\n"
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != content:
            raise QwenchError(f"{folder} holds a quickstart of another seed; remove it or name another folder with --output.")
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in _ENTRIES) if folder.is_dir() else []
    if foreign or folder.is_file():
        raise QwenchError(
            f"{folder} exists already and is not a quickstart's ({', '.join(foreign[:3]) or 'a file'}); "
            "name another folder with --output."
        )
    write_atomically(marker, content)


def run_command(arguments: Sequence[str]) -> None:
    """Run `qwench ...` in a separate process, as a user would. A signal is passed on, and the command saves before it ends.

    Raises:
        QwenchError: it failed.
        Stopped: by the signal.
    """
    with stops_deferred():  # a signal while the command starts must not leave it behind
        command = subprocess.Popen([sys.executable, "-P", "-m", "qwench", *arguments])
        try:
            with interruptible():
                code = command.wait()
        except Stopped as stop:
            command.send_signal(stop.number)
            command.wait()
            raise Stopped(stop.number, "The same command goes on from here:") from None
    if code != 0:
        raise QwenchError(f"`qwench {shlex.join(arguments)}` ended with exit code {code}; see its message above.")


def commands(folder: Path, *, seed: int) -> list[tuple[str, list[str], Path]]:
    """Return the title and argv of every stage, and what is there when the stage is done."""
    base, tuned, learned = folder / "base", folder / "sft-hf", folder / "grpo-hf"
    held_out = ["--eval-prompt-data", "held_out", str(folder / "data" / "test.jsonl")]
    problems = ["--input-key", "prompt", "--label-key", "label", "--apply-chat-template", "--rm-type", "deepscaler"]
    sampling = ["--rollout-max-response-len", "64", "--rollout-temperature", "1.0"]
    return [
        ("A tiny Qwen3 with random weights", ["make-model", "--size", "tiny", "--output", str(base), "--seed", str(seed)],
         base / "config.json"),
        ("Fine-tuning on demonstrations", [
            "sft", "--hf-checkpoint", str(base), "--prompt-data", str(folder / "data" / "sft.jsonl"), "--input-key", "messages",
            "--rollout-shuffle", "--num-rollout", "360", "--rollout-batch-size", "64", "--global-batch-size", "64",
            "--use-dynamic-batch-size", "--max-tokens-per-gpu", "8192", "--lr", "3e-3", "--min-lr", "1e-4",
            "--lr-decay-style", "cosine", "--lr-warmup-iters", "20", "--weight-decay", "0.1", "--adam-beta2", "0.95",
            "--save", str(folder / "sft"), "--save-hf", str(tuned), "--save-interval", "360",
        ], tuned),
        ("Held-out accuracy before GRPO", ["eval", "--hf-checkpoint", str(tuned), *held_out, *problems, *sampling,
                                           "--eval-output", str(folder / "eval-before")],
         folder / "eval-before" / "metrics.json"),
        ("GRPO with the deepscaler reward", [
            "train", "--hf-checkpoint", str(tuned), "--prompt-data", str(folder / "data" / "train.jsonl"), *problems, *sampling,
            "--rollout-shuffle", "--num-rollout", "24", "--rollout-batch-size", "32", "--n-samples-per-prompt", "8",
            "--global-batch-size", "128", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "8192",
            "--advantage-estimator", "grpo", "--eps-clip", "0.2", "--eps-clip-high", "0.28", "--lr", "3e-4",
            "--min-lr", "3e-5", "--lr-decay-style", "cosine", "--weight-decay", "0.0", "--adam-beta2", "0.95", *held_out,
            "--eval-interval", "3", "--colocate", "--save", str(folder / "grpo"), "--save-hf", str(learned),
            "--save-interval", "24",
        ], learned),
        ("Held-out accuracy after GRPO", ["eval", "--hf-checkpoint", str(learned), *held_out, *problems, *sampling,
                                          "--eval-output", str(folder / "eval-after")],
         folder / "eval-after" / "metrics.json"),
    ]  # fmt: skip


def _accuracy(eval_folder: Path) -> float:
    return float(json.loads((eval_folder / "metrics.json").read_text(encoding="utf-8"))["eval/held_out"])
