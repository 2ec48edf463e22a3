r"""Grade answers twice, by `math` and by math-verify: `python -m tests.campaigns.second_grader --labels FILE.jsonl ...`.

Labels are answered in spellings drawn at random (`verdicts.SPELLINGS`). `--answers FILE.jsonl ...` takes a model's answers
instead, from files of `qwench eval --eval-output`. The answers on which the graders differ are printed by kind: spelling, or
how the model's answer is written; which grader says right, how many, and the shortest pair.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from qwench.config.sections.reward import RewardConfig
from qwench.rewards.pool import RewardPool
from qwench.rewards.second_grader import counts_of, differs, records_of
from qwench.samples import Prompt, Sample, Verdict
from tests.campaigns.verdicts import cases

_IN_FLIGHT = 256
_WRITTEN = {
    "several numbers": r"-?[\d.]+(\s*,\s+-?[\d.]+)+$",
    "sum, difference, product or quotient": r"[-+\d\s.,()$\\]*[\d)][\s$]*([-+*/x^]|\\times|\\div|\\cdot)[\s$]*[-\d($\\]",
    "equation": r".*=",
    "full stop": r".*\.$",
    "percent": r".*%",
    "fraction": r".*\\[dt]?frac",
    "decimal": r"[-\\$]*[\d,]*\.\d+$",
    "comma in a number": r"[-\\$]*\d+(,\d+)+$",
    "text or font": r".*\\(text|math|bold)",
    "words or unit": r".*[a-zA-Z]{2}",
    "plain number": r"-?\d+$",
}
"""How an answer can be written: the first pattern that fits its beginning names the kind."""


async def grade(pool: RewardPool, samples: list[Sample]) -> list[Verdict]:
    """Return the verdicts, with the records of both graders."""
    verdicts = list[Verdict]()
    for start in range(0, len(samples), _IN_FLIGHT):
        verdicts += await asyncio.gather(*(pool.grade(sample) for sample in samples[start : start + _IN_FLIGHT]))
    return verdicts


def spelled(files: list[Path], count: int, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yield (spelling, response, label) for labels drawn at random."""
    labels = [row["label"] for row in rows_of(files) if row["label"].strip()]  # a run refuses blank ones
    rng.shuffle(labels)
    for spelling, rm_type, response, label in cases(labels, 2 * count, rng):
        if rm_type == "math":
            yield spelling, response, label


def rows_of(files: list[Path]) -> Iterator[dict[str, Any]]:  # a JSON object has no closed type
    """Yield the rows of jsonl files."""
    for path in files:
        yield from map(json.loads, path.open(encoding="utf-8"))


def written_as(answer: str) -> str:
    """Return how an answer is written."""
    return next((name for name, pattern in _WRITTEN.items() if re.match(pattern, answer.strip())), "other")


def main(words: list[str]) -> None:
    """Run the campaign and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--labels", type=Path, nargs="+")
    source.add_argument("--answers", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(words)
    if flags.labels:
        answers = spelled(flags.labels, flags.count, random.Random(flags.seed))
    else:
        answers = (("", row["response"], row["prompt"]["label"]) for row in rows_of(flags.answers))
    rows = list(islice(answers, flags.count))
    samples = [
        Sample(prompt=Prompt(text="q", token_ids=(1,), label=label), sample_id=index, group_id=0, response=response)
        for index, (_, response, label) in enumerate(rows)
    ]
    pool = RewardPool(RewardConfig(rm_type="math", second_grader="math-verify", second_grader_share=1.0, reward_num_workers=4))
    try:
        verdicts = asyncio.run(grade(pool, samples))
    finally:
        pool.close()
    kinds = defaultdict[tuple[str, bool], list[tuple[int, str, str]]](list)
    for (spelling, _, _), verdict in zip(rows, verdicts, strict=True):
        for record in filter(differs, records_of([verdict])):
            pair = f"{record['answer']} for {record['label']}"
            kind = spelling or written_as(str(record["answer"]))
            kinds[kind, record["first"]["score"] == 1].append((len(pair), pair, record["first"]["reason"]))
    print(f"{len(samples)} answers, {sum(verdict.score for verdict in verdicts):.0f} right by math: {counts_of(verdicts)}")
    for (spelling, first_is_right), pairs in sorted(kinds.items(), key=lambda item: -len(item[1])):
        says = "math right" if first_is_right else "math-verify right"
        print(f"{len(pairs):5d}  {says:18}  {spelling}: {min(pairs)[1]} ({min(pairs)[2]})")


if __name__ == "__main__":
    main(sys.argv[1:])
