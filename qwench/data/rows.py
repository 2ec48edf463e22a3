"""Rows of jsonl, json, csv and parquet files, with the place each came from for error messages.

A data set is named by `path` or `path@[start:stop]`, a Python slice of its rows: `train.jsonl@[:1000]`, `math.parquet@[-200:]`.
The path may be a folder, or a pattern such as `data/*.parquet`: its files follow one another in the order of their names.

Values are plain JSON. Types of a file format are converted here: bytes, dates, decimals, and the nulls that parquet adds to
records of different shape.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet

from qwench.config.values import named_once
from qwench.errors import ConfigError
from qwench.files import DATA_SUFFIXES
from qwench.samples import Json

_UNENCODABLE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
"""Escapes of surrogates, which may be unpaired, and of NUL. A line with one is read a second time."""
_PATTERN_CHARACTERS = frozenset("*?[")
_SPEC = re.compile(r"(?P<path>.*)@\[(?P<start>-?\d{0,18}):(?P<stop>-?\d{0,18})\]")


def row_error(place: str, problem: str) -> ConfigError:
    """Return the error of a row that cannot be used."""
    return ConfigError(f"{place}: {problem}; correct the row, or remove it.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record and its place in the file."""

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
                value = json.loads(value, object_pairs_hook=named_once)
            except (ValueError, RecursionError) as error:
                raise row_error(self.place, f"key {key!r} holds text that is not JSON ({error})") from error
        if value is not None and not isinstance(value, kind):
            raise row_error(self.place, f"key {key!r} must hold a {kind.__name__}, got a {type(value).__name__}")
        self.check_recordable(key, value)
        return value

    def check_recordable(self, key: str | None, value: Json) -> None:
        """Check that dumps and checkpoints of a run can hold a value of this row.

        Raises:
            ConfigError: it has an integer of more than 64 bits, or lies too deep.
        """
        try:
            orjson.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.place}: key {key!r} cannot be recorded ({error}); store it as text.") from error


def read_rows(spec: str) -> list[Row]:
    """Read the rows that `spec` names.

    Raises:
        ConfigError: no such file, an unknown format, an unreadable row, or no rows.
    """
    try:
        path, wanted = parse_spec(spec)
        files = _files(path)
    except (OSError, ValueError, RuntimeError) as error:  # of names that no file can have
        raise ConfigError(
            f"{spec[:200]!r} names no data file ({error}); give a file, a folder, a pattern or a data set of the hub."
        ) from error
    # The rows of a single large file outside the slice are never decoded.
    rows = _READERS[path.suffix](path, wanted) if files == [path] else _join(files)[wanted]
    if not rows:
        raise ConfigError(f"the data set {spec} has no rows; give one with rows, or another slice @[start:stop].")
    return rows


def check_first_row(spec: str, key: str, *, flag: str) -> None:
    """Check that the first row of a file has a key, without reading the rest; what is not told so early is told later.

    Raises:
        ConfigError: it has not.
    """
    path, wanted = parse_spec(spec)
    if not path.is_file():  # a pipe would be waited for
        return
    if path.stat().st_size == 0:
        raise ConfigError(f"the data set {spec} has no rows; give one with rows, or another slice @[start:stop].")
    columns = _first_columns(path) if wanted == slice(None) else None
    if columns is not None and key not in columns:
        place = f"{path}:1" if path.suffix == ".jsonl" else f"{path} row 1"
        raise ConfigError(f"{place}: key {key!r} ({flag}) is missing; the row has: {', '.join(columns)}.")


def _first_columns(path: Path) -> list[str] | None:
    if path.suffix == ".parquet":
        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (pyarrow.ArrowException, OSError):
            return None  # what is wrong with the file is told when it is read
    if path.suffix not in (".jsonl", ".csv"):
        return None
    try:
        with path.open(encoding="utf-8-sig") as lines:  # line ends as `_read_text` has them
            if path.suffix == ".csv":
                return next(csv.reader(lines), None)
            first = json.loads(next((line for line in lines if line.strip()), ""))
    except (OSError, ValueError, RecursionError, csv.Error):
        return None
    return list(first) if isinstance(first, dict) else None


def parse_spec(spec: str) -> tuple[Path, slice]:
    """Split `path@[start:stop]` into the path and the slice; a plain path means all rows."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        return Path(spec).expanduser(), slice(None)
    start, stop = (int(text) if text else None for text in (match["start"], match["stop"]))
    return Path(match["path"]).expanduser(), slice(start, stop)


def _files(path: Path) -> list[Path]:
    """Return the files that a path, a folder or a pattern names, in the order of their names.

    Raises:
        ConfigError: there is none, or one has a format that is not read.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        if not files:
            raise ConfigError(f"the folder {path} has no data files; they end in {_known_formats()}.")
        return files
    if not path.exists() and _PATTERN_CHARACTERS & set(path.name):
        files = sorted(path.parent.glob(path.name))
    else:
        files = [path]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"there is no data file {file}; give an existing file or folder of {_known_formats()}.")
        if file.suffix not in _READERS:
            raise ConfigError(f"{file} has the unknown format {file.suffix!r}; convert it to {_known_formats()}.")
    if not files:
        raise ConfigError(f"no data file is called {path}; give an existing file or folder of {_known_formats()}.")
    return files


def _join(files: list[Path]) -> list[Row]:
    return [row for file in files for row in _READERS[file.suffix](file, slice(None))]


def _known_formats() -> str:
    return ", ".join(_READERS)


def _read_jsonl(path: Path, wanted: slice) -> list[Row]:
    lines = _read_text(path).split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [_parse_line(f"{path}:{number}", line) for number, line in numbered[wanted]]


def _read_json(path: Path, wanted: slice) -> list[Row]:
    """Read one array of records."""
    text = _read_text(path)
    try:
        values = parse_json(str(path), text)
    except ConfigError:
        if _has_object_lines(text):
            raise ConfigError(f"{path} holds one JSON object a line; rename it so that it ends in .jsonl.") from None
        raise
    if not isinstance(values, list):
        raise ConfigError(f"{path} holds a JSON {type(values).__name__}; it must be an array of objects with named keys.")
    return [_row(f"{path} row {number}", record) for number, record in list(enumerate(values, start=1))[wanted]]


def _has_object_lines(text: str) -> bool:
    """Tell whether the first line is a whole JSON object and others follow."""
    first, _, others = text.strip().partition("\n")
    try:
        return bool(others) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(path: Path, wanted: slice) -> list[Row]:
    """Read a table whose first line names the columns; every value is text, an empty one is null."""
    csv.field_size_limit(sys.maxsize)  # the module would refuse a cell of more than 131,072 characters
    reader = csv.DictReader(io.StringIO(_read_text(path)), strict=True)
    rows: list[Row] = []
    try:
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            raise ConfigError(f"{path} has two columns of one name: {', '.join(names)}; rename one.")
        for number, record in enumerate(reader, start=1):
            place = f"{path} row {number}"
            if None in record or None in record.values():
                raise ConfigError(f"{place} has another number of columns than the first line; correct the line.")
            for value in record.values():
                check_text(value, place=place)
            rows.append(_row(place, {key: value or None for key, value in record.items()}))
    except csv.Error as error:
        raise ConfigError(
            f"{path}:{reader.reader.line_num} is not CSV ({error}); correct the line, or convert the file to .jsonl."
        ) from error
    return rows[wanted]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); convert it to UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a file that can be read.") from error


def _parse_line(place: str, line: str) -> Row:
    values = parse_json(place, line)
    if not isinstance(values, dict):
        raise ConfigError(f"{place} holds a JSON {type(values).__name__}; each line must be an object with named keys.")
    return Row(values=values, place=place)


def parse_json(place: str, text: str) -> Json:
    """Return the value of a JSON text in which every text is one (`check_text`).

    Raises:
        ConfigError: it is not JSON, names a key twice, or cannot be read; names `place`.
    """
    try:
        values: Json = json.loads(text, object_pairs_hook=named_once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is not JSON ({error.msg} at column {error.colno}); fix or remove the line.") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; records in records without end
        raise ConfigError(f"{place} cannot be read ({error}); fix or remove the line.") from error
    if _UNENCODABLE.search(text):
        for held in _texts(values):
            check_text(held, place=place)
    return values


def _texts(value: Json) -> Iterator[str]:
    """Yield every text in a value, keys too."""
    match value:
        case str():
            yield value
        case Mapping():
            for key, member in value.items():
                yield key
                yield from _texts(member)
        case list():
            for member in value:
                yield from _texts(member)


def is_blank(text: str) -> bool:
    """Tell whether a text shows nothing: it has spaces, joiners and marks of byte order at most."""
    return not text.strip() or all(one.isspace() or unicodedata.category(one) == "Cf" for one in text)


def check_text(text: str, *, place: str) -> None:
    """Check that a text is one: it can be encoded as UTF-8, and no C program would see its end before it.

    Raises:
        ConfigError: it holds half of a surrogate pair, or a NUL.
    """
    if "\0" in text:
        raise ConfigError(f"{place} holds a NUL character, which is no text; remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{place} holds half of a surrogate pair (U+{ord(text[error.start]):04X}), which is no text; fix the character."
        ) from error


def _row(place: str, values: object) -> Row:
    if not isinstance(values, dict):
        raise ConfigError(f"{place} is a {type(values).__name__}; each row must be an object with named keys.")
    return Row(values=values, place=place)


def _read_parquet(path: Path, wanted: slice) -> list[Row]:
    try:
        table = pyarrow.parquet.read_table(path)
        start, stop, _ = wanted.indices(table.num_rows)
        records = list(_records(table.slice(start, max(stop - start, 0))))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a readable parquet file ({' '.join(str(error).split())[:300]}); "
            "write it again, or convert it to .jsonl."
        ) from error
    rows = []
    for number, record in enumerate(records, start=start + 1):
        place = f"{path} row {number}"
        rows.append(_row(place, {key: _plain(value, place=f"{place}: key {key!r}") for key, value in record.items()}))
    return rows


def _has_narrow_floats(kind: pyarrow.DataType) -> bool:
    return re.search(r"\b(float|halffloat)\b", str(kind)) is not None


def _as_double(value: Any, kind: pyarrow.DataType) -> Any:
    """Give narrow floats the doubles of their shortest digits: as a plain double, 0.1 of 32 bits is 0.10000000149."""
    types = pyarrow.types
    if value is None:
        return None
    if kind in (pyarrow.float32(), pyarrow.float16()):
        return float(str(kind.to_pandas_dtype()(value)))
    if types.is_struct(kind):
        return {field.name: _as_double(value[field.name], field.type) for field in kind}
    if types.is_map(kind):
        return {_as_double(key, kind.key_type): _as_double(member, kind.item_type) for key, member in value.items()}
    return [_as_double(member, kind.value_type) for member in value] if isinstance(value, list) else value


def _records(table: pyarrow.Table) -> Iterator[dict[str, object]]:
    narrow = {column.name: column.type for column in table.schema if _has_narrow_floats(column.type)}
    for batch in table.to_batches(max_chunksize=10_000):
        for record in batch.to_pylist(maps_as_pydicts="strict"):
            yield record | {name: _as_double(record[name], kind) for name, kind in narrow.items()}


def _plain(value: object, *, place: str) -> Json:
    """Return a parquet value as JSON: no null members of records, no bytes, no dates, no decimals."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            check_text(value, place=place)
            return value
        case Mapping():
            # Arrow gives all records of a column one schema: a null member was not in the record, or says nothing.
            named = ((str(_plain(key, place=place)), member) for key, member in value.items())
            return {key: _plain(member, place=place) for key, member in named if member is not None}
        case list() | tuple():
            return [_plain(member, place=place) for member in value]
        case bytes():
            try:
                return _plain(value.decode(), place=place)
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{place} holds bytes that are not UTF-8 text ({error}); write the column as text."
                ) from error
        case date() | datetime() | time():
            return value.isoformat()
        case Decimal() | timedelta():
            return str(value)
        case _:
            raise ConfigError(f"{place} holds a {type(value).__name__}, which is no JSON; store it as text or as a number.")


_READERS: Mapping[str, Callable[[Path, slice], list[Row]]] = dict(
    zip(DATA_SUFFIXES, (_read_jsonl, _read_parquet, _read_json, _read_csv), strict=True)
)
