"""Write the three files of this example beside a downloaded GSM8K: `python make_data.py DATA_DIR`.

DATA_DIR/gsm8k is what `qwench download openai/gsm8k --kind dataset --output DATA_DIR` leaves. Demonstrations end in a boxed
answer; training prompts carry the results of their solution's equations for steps_reward.py.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from steps_reward import results

INSTRUCTION = "Solve the following math problem. Reason step by step, and put your final answer within \\boxed{}.\n\n"


def convert(question: str, worked: str) -> tuple[dict, str]:
    """Return a problem's row for `qwench train`, and its demonstration; `worked` ends in #### and the answer."""
    solution, _, answer = re.sub("<<.*?>>", "", worked).partition("\n#### ")
    answer = answer.replace(",", "")
    row = {
        "prompt": [{"role": "user", "content": INSTRUCTION + question}],
        "label": answer,
        "metadata": {"steps": results(solution)},
    }
    return row, f"{solution}\n\nThe answer is \\boxed{{{answer}}}."


def write(folder: Path) -> None:
    """Write both splits as prompts, and the training split as demonstrations."""
    for split in ("train", "test"):
        source = pq.read_table(folder / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet").to_pylist()
        problems = [convert(problem["question"], problem["answer"]) for problem in source]
        with (folder / f"gsm8k-{split}.jsonl").open("w", encoding="utf-8") as file:
            for row, _ in problems:
                kept = row if split == "train" else {name: row[name] for name in ("prompt", "label")}
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        if split == "train":
            talks = [[*row["prompt"], {"role": "assistant", "content": demonstration}] for row, demonstration in problems]
            pq.write_table(pa.table({"messages": talks}), folder / "gsm8k-sft.parquet")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DATA_DIR", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
