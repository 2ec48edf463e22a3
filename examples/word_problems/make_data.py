"""Write an arithmetic and word-problem set: `python make_data.py OUTPUT_DIR [--seed 0]`.

Every problem is a chain of three to six operations on numbers up to 99, asked as an expression or as a story. Demonstrations
come in Qwen3's two forms: some think step by step, most answer at once with an empty think block. No problem of test.jsonl
appears in the other files.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

THINGS = ("apples", "books", "coins", "stamps", "tickets", "shells", "pens", "cards")
PLACES = ("A box", "A shelf", "A bag", "A drawer", "A cart", "A jar")
ADDED = ("{n} more are put in", "then {n} are added", "someone brings {n} more")
TAKEN = ("{n} are taken out", "then {n} are sold", "{n} get lost")
SHARE_THINKING = 0.4
MAX_VALUE = 99


@dataclass(frozen=True)
class Problem:
    """A start, signed steps, and how it is told."""

    start: int
    steps: tuple[int, ...]
    question: str

    @property
    def answer(self) -> int:
        """Return the final value."""
        return self.start + sum(self.steps)

    @property
    def thoughts(self) -> str:
        """Return one line for each step."""
        lines, value = [], self.start
        for step in self.steps:
            lines.append(f"{value}{step:+d}={value + step}")
            value += step
        return "\n".join(lines)


def draw(rng: random.Random, *, num_steps: tuple[int, int]) -> Problem:
    """Draw a problem whose intermediate values all lie in [0, MAX_VALUE]."""
    start = value = rng.randint(2, 40)
    steps: list[int] = []
    for _ in range(rng.randint(*num_steps)):
        step = rng.choice([n for n in range(max(-value, -20), min(MAX_VALUE - value, 20) + 1) if n != 0])
        steps.append(step)
        value += step
    question = _expression(start, steps) if rng.random() < 0.5 else _story(rng, start, steps)
    return Problem(start, tuple(steps), question)


def _expression(start: int, steps: list[int]) -> str:
    return f"{start}{''.join(f'{step:+d}' for step in steps)}=?"


def _story(rng: random.Random, start: int, steps: list[int]) -> str:
    thing = rng.choice(THINGS)
    told = "; ".join(rng.choice(ADDED if step > 0 else TAKEN).format(n=abs(step)) for step in steps)
    return f"{rng.choice(PLACES)} holds {start} {thing}; {told}. How many {thing} are there now?"


def write_sets(folder: Path, *, seed: int, num_demos: int, num_prompts: int, num_held_out: int) -> None:
    """Write sft.jsonl, train.jsonl and test.jsonl."""
    rng = random.Random(seed)
    held_out = {(p.start, p.steps): p for p in (draw(rng, num_steps=(4, 6)) for _ in range(num_held_out))}

    def fresh(num_steps: tuple[int, int]) -> Problem:
        while ((problem := draw(rng, num_steps=num_steps)).start, problem.steps) in held_out:
            pass
        return problem

    folder.mkdir(parents=True, exist_ok=True)
    _write(
        folder / "sft.jsonl", [_demonstration(fresh((1, 6)), thinks=rng.random() < SHARE_THINKING) for _ in range(num_demos)]
    )
    _write(folder / "train.jsonl", [_row(fresh((4, 6))) for _ in range(num_prompts)])
    _write(folder / "test.jsonl", [_row(problem) for problem in held_out.values()])


def _demonstration(problem: Problem, *, thinks: bool) -> dict[str, object]:
    thoughts = f"{problem.thoughts}\n" if thinks else "\n"
    answer = f"<think>\n{thoughts}</think>\n\n\\boxed{{{problem.answer}}}"
    return {"messages": [{"role": "user", "content": problem.question}, {"role": "assistant", "content": answer}]}


def _row(problem: Problem) -> dict[str, object]:
    return {"prompt": [{"role": "user", "content": problem.question}], "label": str(problem.answer)}


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_sets(arguments.output, seed=arguments.seed, num_demos=100_000, num_prompts=8_000, num_held_out=512)
