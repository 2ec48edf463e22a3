"""`qwench reward check FILE`: grade a jsonl of responses and labels, and show the reasons of the verdicts."""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwench.config.command_line.parse import parse_flags
from qwench.config.environment import JUDGE_KEY_VARIABLE
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.verbs import RewardCheckConfig, split_file
from qwench.data.labels import read_label
from qwench.data.rows import Row as DataRow
from qwench.data.rows import parse_json
from qwench.errors import ConfigError, RewardError
from qwench.observability.console import StandardOutput
from qwench.rewards.pool import RewardPool
from qwench.rewards.second_grader import describe_shortest, judged, records_of
from qwench.samples import Json, Prompt, Sample, Verdict

_IN_FLIGHT = 256  # rows graded at once, so that a file of any size fits in memory
_EXAMPLE_CHARS = 60
_DUMP_HEADER = {"rollout_id", "metrics"}
"""Keys of the first line of a rollout's dump."""
_DUMPED_KEYS = {"prompt", "response", "sample_id", "group_id", "loss_mask", "status"}
"""Keys that tell a sample that Qwench wrote from a line of the user's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the file."""

    line: int
    """Counts from 1, as editors do."""
    sample: Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasonSummary:
    """The verdicts with one reason; where some of them score above 0 and some do not, those on one side of it."""

    reason: str
    count: int
    mean_score: float
    example: Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The verdicts on a file."""

    num_responses: int
    mean_score: float
    reasons: tuple[ReasonSummary, ...]
    """Most frequent first."""
    judged_twice: tuple[Mapping[str, Json], ...] = ()
    """What --second-grader found."""


def run(words: Sequence[str]) -> None:
    """Run `qwench reward check FILE`.

    Raises:
        ConfigError: another command than check, or see `check_file`.
    """
    if words and words[0] in ("-h", "--help", "--help-all"):
        words = ["check", *words]
    if not words or words[0] != "check":
        raise ConfigError(f"qwench reward has one command, check; got {' '.join(words[:1]) or 'none'}")
    file, flags = split_file(words[1:])
    config = parse_flags(RewardCheckConfig, flags, prog="qwench reward check FILE")
    columns = config.columns
    if columns.line is not None:
        show_line(file, columns.line, config=config.reward, response_key=columns.response_key, label_key=columns.label_key)
        return
    check_file(file, config=config.reward, response_key=columns.response_key, label_key=columns.label_key)


def check_file(
    path: Path,
    *,
    config: RewardConfig,
    response_key: str = "response",
    label_key: str = "label",
    console: Console | None = None,
) -> Summary:
    """Grade every line of a jsonl and print a table of the reasons.

    A line holds the response, the label, and optionally `prompt` and `metadata` (whose `rm_type` wins over the flag). Files
    that `qwench eval --eval-output` and --save-debug-rollout-data wrote are read too.

    Raises:
        ConfigError: the file or a line cannot be read or graded; names the file and the line.
    """
    pool = RewardPool(config, judge_key=os.environ.get(JUDGE_KEY_VARIABLE))
    try:
        summary = asyncio.run(_grade(path, pool, response_key=response_key, label_key=label_key))
    finally:
        pool.close()
    shown = console or StandardOutput()
    shown.print(render(summary, title=f"{path.name}: {config.custom_rm_path or config.rm_type or 'by row'}"))
    if config.second_grader is not None:
        differing = describe_shortest(summary.judged_twice) or "none"
        num_judged = sum(map(judged, summary.judged_twice))
        shown.print(Text(f"of {num_judged} answers that were judged twice, the graders differ on: {differing}"))
    return summary


def show_line(
    path: Path, number: int, *, config: RewardConfig, response_key: str, label_key: str, console: Console | None = None
) -> None:
    """Print one line of the file in full, with its verdict.

    Raises:
        ConfigError: there is no such line, or see `check_file`.
    """
    rows = read_rows(path, response_key=response_key, label_key=label_key)
    row = next((row for row in rows if row.line == number), None)
    if row is None:
        raise ConfigError(f"{path} has no response in line {number}.")
    pool = RewardPool(config, judge_key=os.environ.get(JUDGE_KEY_VARIABLE))
    try:
        verdict = asyncio.run(_grade_row(path, row, pool))
    finally:
        pool.close()
    sample, shown = row.sample, console or Console(soft_wrap=True)
    before = [] if sample.verdict is None else [("then", f"{sample.verdict.score:g}, {sample.verdict.reason}")]
    for title, text in (
        ("prompt", sample.prompt.text),
        ("response", sample.response),
        ("label", str(sample.prompt.label)),
        *before,
        ("score", f"{verdict.score:g}"),
        ("reason", verdict.reason),
    ):
        shown.print(Text(title, style="bold"))
        shown.print(Text(text))


def render(summary: Summary, *, title: str) -> Table:
    """Return the summary as a table: one line for each reason, and the total."""
    table = Table(title=title, show_footer=True)
    table.add_column("reason", footer="all")
    table.add_column("count", justify="right", footer=f"{summary.num_responses}")
    table.add_column("share", justify="right", footer="100.0 %")
    table.add_column("mean score", justify="right", footer=f"{summary.mean_score:.3f}")
    table.add_column("example (line: label <- end of the response)")
    for row in summary.reasons:
        share = f"{100 * row.count / summary.num_responses:.1f} %"
        table.add_row(row.reason, f"{row.count}", share, f"{row.mean_score:.3f}", _example(row.example))
    return table


async def _grade(path: Path, pool: RewardPool, *, response_key: str, label_key: str) -> Summary:
    graded: dict[str, dict[bool, list[float]]] = defaultdict(lambda: defaultdict(list))
    examples: dict[tuple[str, bool], Row] = {}
    judged_twice: list[Mapping[str, Json]] = []
    for rows in _batches(read_rows(path, response_key=response_key, label_key=label_key)):
        verdicts = await asyncio.gather(*(_grade_row(path, row, pool) for row in rows))
        judged_twice += records_of(verdicts)
        for row, verdict in zip(rows, verdicts, strict=True):
            side = verdict.score > 0
            graded[verdict.reason][side].append(verdict.score)
            examples.setdefault((verdict.reason, side), row)
    if not examples:
        raise ConfigError(f"{path} has no lines; there is nothing to grade.")
    scores = [score for sides in graded.values() for scores in sides.values() for score in scores]
    reasons = (
        ReasonSummary(
            reason=reason if len(sides) == 1 else f"{reason}, score {'> 0' if side else '<= 0'}",
            count=len(scores),
            mean_score=sum(scores) / len(scores),
            example=examples[reason, side],
        )
        for reason, sides in graded.items()
        for side, scores in sides.items()
    )
    return Summary(
        num_responses=len(scores),
        mean_score=sum(scores) / len(scores),
        reasons=tuple(sorted(reasons, key=lambda row: (-row.count, row.reason))),
        judged_twice=tuple(judged_twice),
    )


async def _grade_row(path: Path, row: Row, pool: RewardPool) -> Verdict:
    try:
        return await pool.grade(row.sample)
    except (RewardError, ConfigError) as error:
        raise ConfigError(f"{path}, line {row.line}: {error}") from error


def read_rows(path: Path, *, response_key: str, label_key: str) -> Iterator[Row]:
    """Yield the lines of a jsonl as finished samples; blank lines are skipped.

    Raises:
        ConfigError: the file cannot be opened, or a line is no record with a response and a label.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                record = _record(line, where)
                if record.keys() == _DUMP_HEADER:
                    continue
                sample = _recorded(record, where)
                yield Row(
                    line=number,
                    sample=sample or _sample(record, number, where, response_key=response_key, label_key=label_key),
                )
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except IsADirectoryError as error:
        files = ", ".join(sorted(file.name for file in path.glob("*.jsonl"))) or "no .jsonl file"
        raise ConfigError(f"{path} is a folder; name one file of responses (it holds {files})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _record(line: str, where: str) -> Mapping[str, Json]:
    record = parse_json(where, line)
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: expected an object with a response and a label, got {line.strip()[:40]}.")
    return record


def _recorded(record: Mapping[str, Json], where: str) -> Sample | None:
    """Return the sample of a line that an evaluation or a rollout's dump holds; None: the line is of another form."""
    if not record.keys() >= _DUMPED_KEYS:
        return None
    try:
        return Sample.from_record(record)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: it looks like a sample that Qwench wrote, but cannot be read ({error!r}).") from error


def _sample(record: Mapping[str, Json], number: int, where: str, *, response_key: str, label_key: str) -> Sample:
    for key, flag in ((response_key, "--response-key"), (label_key, "--label-key")):
        if key not in record:
            raise ConfigError(f"{where}: no key {key!r} ({flag}); the line has: {', '.join(record) or 'nothing'}.")
    response = record[response_key]
    if not isinstance(response, str):
        raise ConfigError(f"{where}: {response_key!r} must be a string, got {json.dumps(response)[:40]}.")
    label = read_label(DataRow(values=record, place=where), label_key, flag="--label-key", required=True)
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ConfigError(f"{where}: 'metadata' must be an object, got {json.dumps(metadata)[:40]}.")
    messages = record.get("prompt", "")
    prompt = Prompt(text=str(messages), token_ids=(), label=label, messages=messages, metadata=metadata)
    return Sample(prompt=prompt, sample_id=number, group_id=number, response=response)


def _batches(rows: Iterator[Row]) -> Iterator[Sequence[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _IN_FLIGHT:
            yield batch
            batch = []
    if batch:
        yield batch


def _example(row: Row) -> Text:
    response = " ".join(row.sample.response.split())
    end = response if len(response) <= _EXAMPLE_CHARS else "..." + response[-_EXAMPLE_CHARS:]
    return Text(f"{row.line}: {row.sample.prompt.label} <- {end}")
