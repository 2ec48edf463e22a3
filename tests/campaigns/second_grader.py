r"""Grade answers twice, by `math` and by math-verify: `python -m tests.campaigns.second_grader --labels FILE.jsonl ...`.

Labels are answered in spellings drawn at random (`verdicts.SPELLINGS`). The answers on which the graders differ are printed by
kind: spelling, which grader says right, how many, and the shortest pair.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

from qwench.config.sections.reward import RewardConfig
from qwench.rewards.pool import RewardPool
from qwench.rewards.second_grader import counts_of, differs, records_of
from qwench.samples import Prompt, Sample, Verdict
from tests.campaigns.verdicts import cases

_IN_FLIGHT = 256


async def grade(pool: RewardPool, samples: list[Sample]) -> list[Verdict]:
    """Return the verdicts, with the records of both graders."""
    verdicts = list[Verdict]()
    for start in range(0, len(samples), _IN_FLIGHT):
        verdicts += await asyncio.gather(*(pool.grade(sample) for sample in samples[start : start + _IN_FLIGHT]))
    return verdicts


def main(words: list[str]) -> None:
    """Run the campaign and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(words)
    rng = random.Random(flags.seed)
    labels = [json.loads(line)["label"] for path in flags.labels for line in path.open(encoding="utf-8")]
    labels = [label for label in labels if label.strip()]  # a run refuses blank ones
    rng.shuffle(labels)
    spellings, samples = list[str](), list[Sample]()
    for spelling, rm_type, response, label in cases(labels, 2 * flags.count, rng):
        if rm_type == "math" and len(samples) < flags.count:
            spellings.append(spelling)
            prompt = Prompt(text="q", token_ids=(1,), label=label)
            samples.append(Sample(prompt=prompt, sample_id=len(samples), group_id=0, response=response))
    pool = RewardPool(RewardConfig(rm_type="math", second_grader="math-verify", second_grader_share=1.0, reward_num_workers=4))
    try:
        verdicts = asyncio.run(grade(pool, samples))
    finally:
        pool.close()
    kinds = defaultdict[tuple[str, bool], list[tuple[int, str, str]]](list)
    for spelling, verdict in zip(spellings, verdicts, strict=True):
        for record in filter(differs, records_of([verdict])):
            pair = f"{record['answer']} for {record['label']}"
            kinds[spelling, record["first"]["score"] == 1].append((len(pair), pair, record["first"]["reason"]))
    print(f"{len(samples)} answers, {sum(verdict.score for verdict in verdicts):.0f} right by math: {counts_of(verdicts)}")
    for (spelling, first_is_right), pairs in sorted(kinds.items(), key=lambda item: -len(item[1])):
        says = "math right" if first_is_right else "math-verify right"
        print(f"{len(pairs):5d}  {says:18}  {spelling}: {min(pairs)[1]} ({min(pairs)[2]})")


if __name__ == "__main__":
    main(sys.argv[1:])
