"""A complete command line of `qwench train`, to take from and add to."""

from pathlib import Path


def words_of(files: Path) -> dict[str, list[str]]:
    return {
        "--hf-checkpoint": [str(files / "model")],
        "--prompt-data": [f"{files / 'train.jsonl'}@[0:1]"],
        "--lr": ["1e-6"],
        "--num-rollout": ["3"],
        "--rollout-batch-size": ["4"],
        "--n-samples-per-prompt": ["2"],
        "--rollout-max-response-len": ["16"],
    }


def flat(words: dict[str, list[str]]) -> list[str]:
    return [word for flag, values in words.items() for word in (flag, *values)]
