"""The checks of `tests/structure.py` and `tests/sizes.py` see what they look for."""

from __future__ import annotations

from pathlib import Path

from tests.sizes import MAX_FILE_LINES, MAX_FUNCTION_LINES, oversized
from tests.structure import circles, hidden_imports, two_way_pairs


def test_a_circle_is_the_modules_that_reach_each_other() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}, "e": {"a"}}
    assert circles(arrows) == [["b", "c", "d"]]


def test_a_chain_has_no_circle() -> None:
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_packages_that_import_each_other_by_other_modules_are_a_pair() -> None:
    arrows = {"q.a.one": {"q.b.one"}, "q.b.two": {"q.a.two"}, "q.c": {"q.a.one"}, "q.a.two": {"q.a.one"}}
    assert two_way_pairs(arrows) == [("q.a", "q.b")]


def test_an_import_by_string_is_seen_and_one_of_a_library_is_not() -> None:
    source = 'import importlib\nimportlib.import_module("qwench.cli")\nimport_module("qwench")\nimport_module("wandb")\n'
    assert hidden_imports(source) == [2, 3]


def test_a_file_and_a_function_at_the_limit_pass_and_longer_ones_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "qwench"
    folder.mkdir()
    body = "    pass\n" * (MAX_FUNCTION_LINES - 1)
    (folder / "fits.py").write_text("def f():\n" + body + "\n" * (MAX_FILE_LINES - MAX_FUNCTION_LINES))
    assert oversized(tmp_path) == []
    (folder / "long.py").write_text("def f():\n    pass\n" + body + "\n" * (MAX_FILE_LINES - MAX_FUNCTION_LINES))
    assert oversized(tmp_path) == [
        f"qwench/long.py: {MAX_FILE_LINES + 1} lines, at most {MAX_FILE_LINES}",
        f"qwench/long.py:1 f: {MAX_FUNCTION_LINES + 1} lines, at most {MAX_FUNCTION_LINES}",
    ]
