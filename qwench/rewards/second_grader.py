r"""`--second-grader math-verify`: a share of the boxed answers is judged twice, and the run lists where the graders differ.

    verdict of --rm-type -> sampled? -> worker -> verdict with extra["second_grader"] = {answer, label, first, second}

The score stays that of --rm-type. A line of `second_grader.jsonl` is one answer on which the two differ.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import orjson

from qwench.config.sections.reward import BOXED_ANSWERS, RewardConfig
from qwench.errors import ConfigError
from qwench.files import write_atomically, written
from qwench.rewards.boxed import after_thinking, bare_label, last_box
from qwench.rewards.worker_process import WorkerPool
from qwench.samples import Json, Rollout, Sample, Verdict

RECORD = "second_grader"
"""Entry of `Verdict.extra`."""
DISAGREEMENTS = "second_grader.jsonl"
"""File in the run's folder."""


class SecondGrader:
    """Judges a share of the answers again; owns its worker processes."""

    def __init__(self, share: float, *, num_workers: int, timeout_s: float) -> None:
        """Start no worker yet."""
        self._share = share
        self._workers = WorkerPool("qwench.rewards.math_verify_worker", num_workers=num_workers, timeout_s=timeout_s)

    async def compare(self, sample: Sample, rm_type: str, first: Verdict) -> Verdict:
        """Return the first verdict, with a record of both where the sample is drawn and has a boxed answer."""
        if rm_type not in BOXED_ANSWERS or not first.graded or not _is_drawn(sample, self._share):
            return first
        text = after_thinking(sample.response) if rm_type == "deepscaler" else sample.response
        answer, label = last_box(text or ""), bare_label(sample.prompt.label or "")
        if answer is None or not label:
            return first
        second = await self._workers.settle([(answer, label)])
        record = {
            "answer": answer,
            "label": label,
            "first": {"score": first.score, "reason": first.reason},
            "second": {"score": second.score, "reason": second.reason},
        }
        return replace(first, extra={**first.extra, RECORD: record})

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


def check_math_verify() -> None:
    """Check that math-verify is installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("math_verify") is None:
        raise ConfigError("--second-grader math-verify is not installed; pip install 'qwench[math-verify]', or leave it out.")


def open_second_grader(reward: RewardConfig, num_workers: int) -> SecondGrader | None:
    """Return the second grader that the flags ask for, with a quarter of the workers; None: there is none."""
    if reward.second_grader is None:
        return None
    workers, timeout_s = max(1, num_workers // 4), reward.reward_timeout_s
    return SecondGrader(reward.second_grader_share, num_workers=workers, timeout_s=timeout_s)


def _is_drawn(sample: Sample, share: float) -> bool:
    """Tell whether a sample is judged twice; the same in every run."""
    return random.Random(sample.sample_id).random() < share


def records_of(verdicts: Iterable[Verdict | None]) -> list[Mapping[str, Json]]:
    """Return the records of the answers that were judged twice."""
    found = (verdict.extra.get(RECORD) for verdict in verdicts if verdict is not None)
    # A custom reward may return an entry of this name too.
    return [record for record in found if isinstance(record, Mapping) and {"first", "second"} <= record.keys()]


def differs(record: Mapping[str, Json]) -> bool:
    """Tell whether both graders judged, and one found right what the other found wrong."""
    return judged(record) and record["first"]["score"] != record["second"]["score"]


def judged(record: Mapping[str, Json]) -> bool:
    """Tell whether the second grader came to a verdict."""
    return Verdict(score=0.0, reason=record["second"]["reason"]).graded


def counts_of(verdicts: Iterable[Verdict | None]) -> dict[str, float]:
    """Return how many answers were judged twice, and on how many the graders differ; nothing without a second grader."""
    records = records_of(verdicts)
    if not records:
        return {}
    return {
        "second_grader/compared": float(sum(map(judged, records))),
        "second_grader/differs": float(sum(map(differs, records))),
        "second_grader/ungraded": float(sum(not judged(record) for record in records)),
    }


def list_disagreements(path: Path, rollout: Rollout) -> None:
    """Add a rollout's answers on which the graders differ. A rollout that is made again replaces its lines, and later ones.

    Raises:
        OutputError: the disk is full.
    """
    lines = [*read_disagreements(path)] if path.is_file() else []
    kept = [line for line in lines if line["rollout_id"] < rollout.rollout_id]
    new = [
        {"rollout_id": rollout.rollout_id, "prompt": sample.prompt.place, "group_id": sample.group_id}
        | {"sample_id": sample.sample_id, **record}
        for sample in rollout.samples
        for record in records_of([sample.verdict])
        if differs(record)
    ]
    if new or len(kept) != len(lines):
        with written(f"the list of --second-grader, {path},", path):
            write_atomically(path, b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in (*kept, *new)))


def read_disagreements(path: Path) -> Iterator[dict[str, Json]]:
    """Yield the lines of the file.

    Raises:
        ConfigError: it is not what a run wrote.
    """
    try:
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); move it away.") from error
    for number, line in enumerate(lines, start=1):
        if not _is_disagreement(line):
            raise ConfigError(f"{path} line {number} is not of a run with --second-grader; move the file away.")
        yield line


def _is_disagreement(line: Json) -> bool:
    """Tell whether a value is what `list_disagreements` writes."""
    if not isinstance(line, dict) or not isinstance(line.get("rollout_id"), int):
        return False
    verdicts = [line.get("first"), line.get("second")]
    judged_twice = all(isinstance(one, dict) and {"score", "reason"} <= one.keys() for one in verdicts)
    return judged_twice and isinstance(line.get("answer"), str) and isinstance(line.get("label"), str)


def describe_shortest(records: Iterable[Mapping[str, Json]]) -> str | None:
    """Say how many answers the graders judge differently, and the shortest pair; None: there is none."""
    differing = [record for record in records if differs(record)]
    if not differing:
        return None
    one = min(differing, key=lambda record: len(record["answer"]) + len(record["label"]))
    first, second = one["first"], one["second"]
    return (
        f"{len(differing)} answers; the shortest: {one['answer']} for {one['label']}, "
        f"{first['score']:g} ({first['reason']}) by --rm-type, {second['score']:g} ({second['reason']}) by math-verify"
    )
