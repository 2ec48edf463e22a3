"""Rows of jsonl and parquet files, with the place each came from for error messages.

A data set is named by `path` or `path@[start:stop]`, a Python slice of its rows: `train.jsonl@[:1000]`, `math.parquet@[-200:]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from qwench.errors import ConfigError
from qwench.samples import Json

_SPEC = re.compile(r"(?P<path>.*)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record and where it stands."""

    values: Mapping[str, Json]
    place: str
    """`train.jsonl:12` or `train.parquet row 12`, counted from 1 in the whole file."""

    def require(self, key: str, *, flag: str) -> Json:
        """Return the value of `key`, which `flag` named.

        Raises:
            ConfigError: the row lacks the key, or it is null.
        """
        value = self.values.get(key)
        if value is None:
            state = "is null" if key in self.values else "is missing"
            raise ConfigError(f"{self.place}: key {key!r} ({flag}) {state}; the row has: {', '.join(self.values)}.")
        return value

    def decode(self, key: str | None, kind: type[list[Json]] | type[dict[str, Json]]) -> Json:
        """Return the list or record under an optional key, given as such or as JSON text; None when absent.

        Raises:
            ConfigError: the value is something else.
        """
        value = self.values.get(key) if key is not None else None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{self.place}: key {key!r} holds text that is not JSON ({error}).") from error
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{self.place}: key {key!r} must hold a {kind.__name__}, got a {type(value).__name__}.")
        return value


def read_rows(spec: str) -> list[Row]:
    """Read the rows that `spec` names.

    Raises:
        ConfigError: no such file, another format than jsonl or parquet, an unreadable line, or no rows.
    """
    path, wanted = parse_spec(spec)
    if not path.is_file():
        raise ConfigError(f"there is no data file {path}; give an existing .jsonl or .parquet file.")
    match path.suffix:
        case ".jsonl":
            rows = _read_jsonl(path, wanted)
        case ".parquet":
            rows = _read_parquet(path, wanted)
        case suffix:
            raise ConfigError(f"{path} has the unknown format {suffix!r}; convert it to .jsonl or .parquet.")
    if not rows:
        raise ConfigError(f"the data set {spec} has no rows.")
    return rows


def parse_spec(spec: str) -> tuple[Path, slice]:
    """Split `path@[start:stop]` into the path and the slice; a plain path means all rows."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        return Path(spec).expanduser(), slice(None)
    start, stop = (int(text) if text else None for text in (match["start"], match["stop"]))
    return Path(match["path"]).expanduser(), slice(start, stop)


def _read_jsonl(path: Path, wanted: slice) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}).") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [_parse_line(f"{path}:{number}", line) for number, line in numbered[wanted]]


def _parse_line(place: str, line: str) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is not JSON ({error.msg} at column {error.colno}); fix or remove the line.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{place} holds a JSON {type(values).__name__}; each line must be an object with named keys.")
    return Row(values=values, place=place)


def _read_parquet(path: Path, wanted: slice) -> list[Row]:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is not a readable parquet file ({error}).") from error
    start, stop, _ = wanted.indices(table.num_rows)
    return [
        Row(values=values, place=f"{path} row {number}")
        for number, values in enumerate(_records(table.slice(start, max(stop - start, 0))), start=start + 1)
    ]


def _records(table: pyarrow.Table) -> Iterator[dict[str, Json]]:
    for batch in table.to_batches(max_chunksize=10_000):
        yield from batch.to_pylist()
