"""Give each training prompt its pass rate: `python rate.py PROMPTS.jsonl EVALUATED.jsonl RATED.jsonl`.

EVALUATED is what `qwench eval --eval-output` wrote of the same prompts: its group_id counts their rows. `--curriculum-key`
reads the column `pass_rate`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean


def main() -> None:
    """Write the rated prompts, and print how many were solved always, sometimes and never."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prompts", "evaluated", "rated"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    rewards = defaultdict(list)
    with given.evaluated.open(encoding="utf-8") as answers:
        for sample in map(json.loads, answers):
            rewards[sample["group_id"]].append(sample["reward"])
    with given.prompts.open(encoding="utf-8") as prompts:
        rows = [json.loads(line) for line in prompts]  # one of them holds U+2028, at which splitlines would divide it
    rates = [fmean(rewards[row]) for row in range(len(rows))]
    lines = [json.dumps({**row, "pass_rate": rate}) for row, rate in zip(rows, rates, strict=True)]
    given.rated.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"solved always: {rates.count(1.0)}, sometimes: {sum(0 < rate < 1 for rate in rates)}, never: {rates.count(0.0)}")


if __name__ == "__main__":
    main()
