import json
import os
from datetime import date, datetime
from decimal import Decimal
from uuid import UUID

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from qwench.data.labels import read_label
from qwench.data.rows import check_first_row, parse_spec, read_rows
from qwench.errors import ConfigError


def write_jsonl(path, values) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def write_parquet(path, values) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    return str(path)


@pytest.fixture(params=[("rows.jsonl", write_jsonl), ("rows.parquet", write_parquet)], ids=["jsonl", "parquet"])
def ten_rows(request, tmp_path) -> str:
    name, write = request.param
    return write(tmp_path / name, [{"n": n} for n in range(10)])


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("", list(range(10))),
        ("@[2:5]", [2, 3, 4]),
        ("@[:3]", [0, 1, 2]),
        ("@[-2:]", [8, 9]),
        ("@[:-8]", [0, 1]),
        ("@[-3:-1]", [7, 8]),
        ("@[8:100]", [8, 9]),
        ("@[:]", list(range(10))),
    ],
)
def test_slices_are_python_slices(ten_rows, suffix, expected):
    assert [row.values["n"] for row in read_rows(ten_rows + suffix)] == expected


def test_places_count_from_one_in_the_whole_file(ten_rows):
    (row,) = read_rows(ten_rows + "@[-1:]")
    assert row.place in (f"{ten_rows}:10", f"{ten_rows} row 10")


def test_places_count_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 0}\n\n{"n": 1}\n')
    assert [row.place for row in read_rows(str(path))] == [f"{path}:1", f"{path}:3"]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert read_rows(str(path))[0].values == {"text": "a\u2028b"}


def test_an_at_sign_in_a_path_is_no_slice():
    path, wanted = parse_spec("runs@home/data@[1:].jsonl")
    assert (str(path), wanted) == ("runs@home/data@[1:].jsonl", slice(None))


def test_unparsable_line_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"n": 1}\n{"n": \n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl:2 is not JSON"):
        read_rows(str(path))


def test_line_that_is_no_record_is_refused(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("[1, 2]\n")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:1 holds a JSON list"):
        read_rows(str(path))


def test_missing_file_unknown_format_and_empty_data_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no data file .*none\.jsonl"):
        read_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "data.xlsx").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"unknown format '\.xlsx'; convert it to \.jsonl, \.parquet, \.json, \.csv"):
        read_rows(str(tmp_path / "data.xlsx"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="has no rows"):
        read_rows(str(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("suffix", ["@[10:]", "@[5:2]"])
def test_slice_that_leaves_nothing_is_refused(ten_rows, suffix):
    with pytest.raises(ConfigError, match="has no rows"):
        read_rows(ten_rows + suffix)


def test_broken_parquet_is_refused(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="not a readable parquet file"):
        read_rows(str(tmp_path / "bad.parquet"))


def test_missing_key_lists_the_keys_there_are(ten_rows):
    with pytest.raises(ConfigError, match=r"key 'prompt' \(--input-key\) is missing; the row has: n"):
        read_rows(ten_rows)[0].require("prompt", flag="--input-key")


def test_optional_json_text_is_decoded_and_other_kinds_refused(tmp_path):
    values = {"tools": '[{"name": "add"}]', "meta": 3, "broken": "[1", "twice": '{"a": 1, "a": 2}'}
    path = write_jsonl(tmp_path / "rows.jsonl", [values])
    (row,) = read_rows(path)
    assert row.decode("tools", list) == [{"name": "add"}]
    assert row.decode("absent", list) is None
    assert row.decode(None, list) is None
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: key 'meta' must hold a dict, got a int"):
        row.decode("meta", dict)
    with pytest.raises(ConfigError, match=r"key 'broken' holds text that is not JSON"):
        row.decode("broken", list)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: key 'twice' holds text .* names the key 'a' twice"):
        row.decode("twice", dict)


def test_csv_and_json_arrays_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('q,a\n"2+5, please",7\n"two\nlines",\n')
    assert [row.values for row in read_rows(str(tmp_path / "a.csv"))] == [
        {"q": "2+5, please", "a": "7"},
        {"q": "two\nlines", "a": None},
    ]
    (tmp_path / "a.json").write_text('[{"q": 1}, {"q": 2}]')
    rows = read_rows(str(tmp_path / "a.json@[1:]"))
    assert [(row.values, row.place.rsplit("/")[-1]) for row in rows] == [({"q": 2}, "a.json row 2")]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "q,a\n1,2,3\n", "row 1 has another number of columns"),
        ("a.csv", "q,a\n1\n", "row 1 has another number of columns"),
        ("a.csv", "q,q\n1,2\n", "two columns of one name: q, q"),
        ("a.csv", 'q,a\n"x"y,2\n', r"a\.csv:2 is not CSV .*; correct the line"),
        ("a.csv", "q,a\nx\0y,2\n", r"a\.csv row 1 holds a NUL character"),
        ("a.json", '{"q": 1}', "holds a JSON dict; it must be an array"),
        ("a.json", "[1]", "row 1 is a int; each row must be an object"),
        ("a.json", '{"q": 1}\n{"q": 2}\n', r"a\.json holds one JSON object a line; rename it so that it ends in \.jsonl"),
        ("a.json", '{"q": 1,\n"a": }\n', r"a\.json is not JSON"),
        ("a.jsonl", '{"q": "\\ud83d alone"}', r"a\.jsonl:1 holds half of a surrogate pair \(U\+D83D\)"),
        ("a.jsonl", '{"q": ["a", {"b": "\\ud83d"}]}', r"a\.jsonl:1 holds half of a surrogate pair \(U\+D83D\)"),
        ("a.jsonl", '{"q": [{"\\ud83d": 1}]}', r"a\.jsonl:1 holds half of a surrogate pair \(U\+D83D\)"),
        ("a.jsonl", '{"q": "nul \\u0000"}', r"a\.jsonl:1 holds a NUL character"),
        ("a.jsonl", '{"q": 1' + "0" * 5000 + "}", r"a\.jsonl:1 cannot be read \(Exceeds the limit"),
        ("a.jsonl", '{"q": ' + "[" * 100_000 + "}", r"a\.jsonl:1 (cannot be read|is not JSON)"),
        ("a.jsonl", '{"q": 1}\n{"q": 1, "a": 2, "q": 3}\n', r"a\.jsonl:2 cannot be read \(it names the key 'q' twice\)"),
        ("a.jsonl", '{"q": [{"b": 1, "b": 1}]}', r"a\.jsonl:1 cannot be read \(it names the key 'b' twice\)"),
        ("a.json", '[{"q": 1, "q": 2}]', r"a\.json cannot be read \(it names the key 'q' twice\)"),
    ],
)
def test_a_row_that_cannot_be_used_is_one_line(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=problem):
        read_rows(str(tmp_path / name))


def test_a_file_that_the_disk_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(self, **encoding):
        raise PermissionError(13, "Permission denied")

    spec = write_jsonl(tmp_path / "a.jsonl", [{"q": 1}])
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(ConfigError, match=r"a\.jsonl cannot be read \(.*Permission denied\); give a file that can be read"):
        read_rows(spec)


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_a_file_that_cannot_be_read_as_text_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"q\xff\n1\n")
    with pytest.raises(ConfigError, match=rf"{name} is not UTF-8 text \(.*0xff in position 1"):
        read_rows(str(tmp_path / name))


def test_a_value_that_is_no_json_is_refused_by_its_type(tmp_path):
    column = pyarrow.array([UUID(int=5).bytes], pyarrow.uuid())
    pyarrow.parquet.write_table(pyarrow.table({"t": column}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"row 1: key 't' holds a UUID, which is no JSON; store it as text or as a number"):
        read_rows(str(tmp_path / "a.parquet"))


def map_column(*items) -> pyarrow.Array:
    return pyarrow.array([items], pyarrow.map_(pyarrow.infer_type([items[0][0]]), pyarrow.int64()))


@pytest.mark.parametrize(
    "column", [pyarrow.array(["nul \0"]), pyarrow.array([b"nul \0"]), map_column(("k\0", 1)), map_column((b"k\0", 1))]
)
def test_a_nul_in_parquet_is_refused_as_in_jsonl(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table({"q": column}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet row 1: key 'q' holds a NUL character"):
        read_rows(str(tmp_path / "a.parquet"))


def test_bytes_that_are_the_key_of_a_map_become_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"q": map_column((b"k", 1))}), tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet"))[0].values == {"q": {"k": 1}}


def test_keys_of_a_map_that_are_lists_are_one_line(tmp_path):
    column = pyarrow.array([[([1], 1)]], pyarrow.map_(pyarrow.list_(pyarrow.int64()), pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({"q": column}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet is not a readable parquet file \(unhashable type: 'list'\)"):
        read_rows(str(tmp_path / "a.parquet"))


def test_times_that_no_python_value_holds_are_one_line(tmp_path):
    column = pyarrow.array([1, 2**62], type=pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"t": column}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet is not a readable parquet file") as caught:
        read_rows(str(tmp_path / "a.parquet"))
    assert "\n" not in str(caught.value)


def test_csv_cells_may_hold_line_separators_and_long_texts(tmp_path):
    text = "a\u2028b\x0bc\x85d" + "x" * 200_000
    (tmp_path / "a.csv").write_text(f"q,a\n{text},7\n", encoding="utf-8")
    assert [row.values for row in read_rows(str(tmp_path / "a.csv"))] == [{"q": text, "a": "7"}]


@pytest.mark.parametrize("spec", ["x" * 300 + ".jsonl", "~nobody-of-that-name/a.jsonl", "a/***.jsonl", "nul\0.jsonl"])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no data file"):
        read_rows(spec)


@pytest.mark.parametrize(
    ("value", "problem"), [({"n": 10**30}, "64-bit"), ({"n": json.loads("[" * 900 + "]" * 900)}, "ecursion")]
)
def test_what_no_record_of_a_run_can_hold_is_refused_by_key_and_line(tmp_path, value, problem):
    (row,) = read_rows(write_jsonl(tmp_path / "a.jsonl", [{"m": value}]))
    with pytest.raises(ConfigError, match=rf"a\.jsonl:1: key 'm' cannot be recorded .*{problem}"):
        row.decode("m", dict)


def test_a_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "\\ud83d\\ude00 C:\\\\u0000"}\n')
    assert read_rows(str(tmp_path / "a.jsonl"))[0].values == {"q": "\U0001f600 C:\\u0000"}


def test_files_of_a_folder_or_pattern_follow_one_another(tmp_path):
    for name, value in (("b.jsonl", 2), ("a.jsonl", 1), ("c.json", 3)):
        (tmp_path / name).write_text(json.dumps({"n": value} if name != "c.json" else [{"n": value}]))
    (tmp_path / "README.md").write_text("no data")
    assert [row.values["n"] for row in read_rows(str(tmp_path))] == [1, 2, 3]
    assert [row.values["n"] for row in read_rows(f"{tmp_path}/*.jsonl@[1:]")] == [2]
    (tmp_path / "d[1].jsonl").write_text('{"n": 4}')
    assert [row.values["n"] for row in read_rows(f"{tmp_path}/d[1].jsonl")] == [4]
    with pytest.raises(ConfigError, match=r"no data file is called .*/\*\.csv"):
        read_rows(f"{tmp_path}/*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"the folder .*empty has no data files"):
        read_rows(str(tmp_path / "empty"))


def test_nulls_that_parquet_adds_to_records_are_no_part_of_the_data(tmp_path):
    records = [{"args": {"x": 6}, "calls": [{"f": "a"}, {"g": 1}], "note": None}, {"args": {"y": 7}, "calls": [], "note": "n"}]
    assert [row.values for row in read_rows(write_parquet(tmp_path / "a.parquet", records))] == [
        {"args": {"x": 6}, "calls": [{"f": "a"}, {"g": 1}], "note": None},
        {"args": {"y": 7}, "calls": [], "note": "n"},
    ]


def test_narrow_floats_of_parquet_keep_the_digits_that_were_stored(tmp_path):
    kinds = {"f": pyarrow.float32(), "h": pyarrow.float16()}
    columns = {name: pyarrow.array([0.1, None, 7.0], pyarrow.float32()).cast(kind) for name, kind in kinds.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    labels = [read_label(row, name, flag="--label-key", required=True) for row in (rows[0], rows[2]) for name in kinds]
    assert labels == ["0.1", "0.1", "7.0", "7.0"]
    assert rows[1].values == {"f": None, "h": None}


def test_narrow_floats_inside_other_values_of_parquet_keep_their_digits(tmp_path):
    floats, inner = pyarrow.list_(pyarrow.float32()), pyarrow.struct([("x", pyarrow.float16()), ("d", pyarrow.float64())])
    by_name, by_number = (pyarrow.map_(key, floats) for key in (pyarrow.string(), pyarrow.float32()))
    view = pyarrow.list_view(pyarrow.float32())
    members = {"f": pyarrow.float32(), "l": floats, "s": inner, "m": by_name, "n": by_number, "v": view}
    kind = pyarrow.struct(list(members.items()))
    half = numpy.float16(0.1)
    values = [
        {
            **{"f": 0.1, "l": [0.7, None], "s": {"x": half, "d": 0.10000000149}},
            **{"m": [("k", [0.3])], "n": [(0.9, [])], "v": [0.6]},
        },
        None,
    ]
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array(values, kind)}), tmp_path / "a.parquet")
    read = [row.values["a"] for row in read_rows(str(tmp_path / "a.parquet"))]
    whole = {"f": 0.1, "l": [0.7, None], "s": {"x": 0.1, "d": 0.10000000149}, "m": {"k": [0.3]}, "n": {"0.9": []}, "v": [0.6]}
    assert read == [whole, None]


def test_maps_of_parquet_are_records_whose_keys_stand_once(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.struct([("type", pyarrow.string())]))

    def write(pairs):
        pyarrow.parquet.write_table(pyarrow.table({"tool": pyarrow.array([pairs], kind)}), tmp_path / "a.parquet")
        return read_rows(str(tmp_path / "a.parquet"))

    assert write([("x", {"type": "number"})])[0].values == {"tool": {"x": {"type": "number"}}}
    with pytest.raises(ConfigError, match=r"a\.parquet is not a readable parquet file \(.*duplicate key was 'x'"):
        write([("x", {"type": "number"}), ("x", {"type": "string"})])


def test_typed_values_of_parquet_become_text(tmp_path):
    values = {"b": b"7", "d": date(2026, 2, 3), "c": Decimal("1.50"), "m": {"t": datetime(2026, 2, 3, 4, 5)}}
    assert read_rows(write_parquet(tmp_path / "a.parquet", [values]))[0].values == {
        "b": "7",
        "d": "2026-02-03",
        "c": "1.50",
        "m": {"t": "2026-02-03T04:05:00"},
    }
    with pytest.raises(ConfigError, match=r"b\.parquet row 1: key 'b' holds bytes that are not UTF-8"):
        read_rows(write_parquet(tmp_path / "b.parquet", [{"b": b"\xff"}]))


@pytest.mark.parametrize(("name", "write", "place"), [("a.jsonl", write_jsonl, ":1"), ("a.parquet", write_parquet, " row 1")])
def test_a_column_that_the_first_row_lacks_is_told_without_reading_the_others(tmp_path, name, write, place):
    spec = write(tmp_path / name, [{"question": "1+1", "answer": "2"}])
    with pytest.raises(ConfigError) as caught:
        check_first_row(spec, "prompt", flag="--input-key")
    assert str(caught.value) == f"{spec}{place}: key 'prompt' (--input-key) is missing; the row has: question, answer."
    check_first_row(spec, "question", flag="--input-key")
    (tmp_path / "b.jsonl").write_text('\n{"question": "1+1"}\n')
    with pytest.raises(ConfigError, match=r"key 'prompt' \(--input-key\) is missing"):
        check_first_row(str(tmp_path / "b.jsonl"), "prompt", flag="--input-key")


def test_the_header_of_a_table_and_an_empty_file_are_told_at_once(tmp_path):
    (tmp_path / "a.csv").write_text('question,"the answer"\n1+1,2\n')
    with pytest.raises(ConfigError, match=r"a.csv row 1: key 'prompt' .* the row has: question, the answer"):
        check_first_row(str(tmp_path / "a.csv"), "prompt", flag="--input-key")
    check_first_row(str(tmp_path / "a.csv"), "the answer", flag="--input-key")
    (tmp_path / "c.csv").write_bytes(b'"two\r\nlines"\r\n7\r\n')
    check_first_row(str(tmp_path / "c.csv"), *read_rows(str(tmp_path / "c.csv"))[0].values, flag="--input-key")
    (tmp_path / "d.csv").write_text("\ufeffquestion\n1+1\n", encoding="utf-8")
    check_first_row(str(tmp_path / "d.csv"), "question", flag="--input-key")
    assert read_rows(str(tmp_path / "d.csv"))[0].values == {"question": "1+1"}
    (tmp_path / "b.csv").touch()
    with pytest.raises(ConfigError, match=r"the data set .*b.csv has no rows"):
        check_first_row(str(tmp_path / "b.csv"), "prompt", flag="--input-key")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_pipe_is_refused_without_a_wait_for_what_writes_to_it(tmp_path, name):
    os.mkfifo(tmp_path / name)
    check_first_row(str(tmp_path / name), "prompt", flag="--input-key")
    with pytest.raises(ConfigError, match="there is no data file"):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ("\n", "no rows"),
        ("not json\n", ":1 is not JSON"),
        ("[1]\n", ":1 holds a JSON list"),
        ('\n{"prompt": 1}\n', [{"prompt": 1}]),
    ],
)
def test_what_the_first_line_does_not_tell_is_left_to_the_reader(tmp_path, content, read):
    path = str(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(content)
    check_first_row(path, "prompt", flag="--input-key")
    check_first_row(f"{path}@[1:]", "question", flag="--input-key")
    (tmp_path / "a.json").write_text('{"prompt": 1}')
    for other in ("a.json", "none.jsonl", "none.parquet", "."):
        check_first_row(str(tmp_path / other), "question", flag="--input-key")
    if isinstance(read, str):
        with pytest.raises(ConfigError, match=read):
            read_rows(path)
    else:
        assert [row.values for row in read_rows(path)] == read
