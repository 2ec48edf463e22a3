"""The campaign that changes the code: what it changes, which tests it runs, and what it calls noticed."""

from __future__ import annotations

import ast
import gc
import os
import time
from pathlib import Path

import pytest

from tests.campaigns import mutations
from tests.campaigns.changes import changes_of, code_of
from tests.campaigns.mutations import Campaign, Outcome, mutant_of, places_of
from tests.campaigns.reach import Reach, _seconds_of, with_calls

SOURCE = '''"""A module."""
from __future__ import annotations

def twice(number):
    """Return it twice."""
    def inner():
        return number * 2
    return inner()

limit = [item for item in () if item]
'''
PASSING = "def test_it():\n    pass\n"
FAILING = "def test_it():\n    assert False\n"
FORKED = """import os, time
def test_it():
    if os.fork() == 0:
        time.sleep(0.3)
        assert {holds}
"""


@pytest.mark.parametrize(
    ("text", "passes"),
    [(PASSING, True), (FAILING, False), (FORKED.format(holds=False), False), ("while True: pass", False)],
    ids=["passes", "fails", "fork outlives the test", "too late"],
)
def test_a_change_is_noticed_where_a_test_fails(text: str, passes: bool, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(text)
    result = mutations.outcome([str(tmp_path / "test_it.py")], 1.0 if "while" in text else 60.0)
    assert result.passed == passes
    assert result.failed.rpartition("::")[2] == ("test_it" if "assert" in text else "")


class _WaitsInForks:
    """Garbage that ends in the process that made it alone, as a store whose threads a fork has not."""

    def __init__(self) -> None:
        self.itself, self.pid = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.pid:
            time.sleep(60.0)


def test_what_tests_before_have_left_does_not_end_in_the_fork(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PASSING)
    gc.disable()
    try:
        _WaitsInForks()
        assert mutations.outcome([str(tmp_path / "test_it.py")], 20.0).passed
    finally:
        gc.enable()


def test_a_recorded_test_that_is_gone_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test_it.py").write_text(f"{PASSING}\n{FAILING.replace('test_it', 'test_other')}")
    gone, it, other = (f"test_it.py::test_{name}" for name in ("gone", "it", "other"))
    for tests, failed in (([gone, it], ""), ([gone, other], other), ([gone], ""), (["test_gone.py::test_it", other], other)):
        result = mutations.outcome(tests, 60.0)
        assert (result.passed, result.failed) == (not failed, failed)


def test_the_changes_of_a_module_each_change_one_thing() -> None:
    changes = [mutant_of(SOURCE, place) for place in places_of(SOURCE)]
    said = [(change.line, change.before.strip(), change.after.strip()) for change in changes]
    assert said == [
        (7, "return number * 2", "return None"), (7, "number * 2", "number / 2"), (7, "2", "3"),
        (8, "return inner()", "return None"),
        (10, "for item in () if item", "for item in ()"), (10, "for item in () if item", "for item in () if not item"),
    ]  # fmt: skip
    whole = ast.unparse(ast.parse(SOURCE))
    assert [change.source.count("\n") for change in changes] == [whole.count("\n")] * 6
    assert "number / 2" in changes[1].source and "limit = [item for item in () if item]" in changes[1].source


@pytest.mark.parametrize(
    "text",
    [
        "T = TypeVar('T', int, str)",
        "__all__ = ['one', 'two']",
        "__slots__ = ('one', 'two')",
        "Mode = Literal['one', 'two']",
        "Ids = tuple[int, ...] | None",
        "Made = NewType('Made', int)",
    ],
)
def test_names_of_types_and_exports_are_not_changed(text: str) -> None:
    assert [kind for node in code_of(ast.parse(text)) for kind, _ in changes_of(node)] == []


def test_the_type_of_a_cast_is_not_changed() -> None:
    changes = [ast.unparse(new) for node in code_of(ast.parse("x = cast(list[Loss], f(1))")) for _, new in changes_of(node)]
    assert changes == ["2"]


def test_a_recording_tells_which_function_a_test_called(tmp_path: Path) -> None:
    text = with_calls(SOURCE, "qwench/it.py").replace("from qwench import _reach\n", "")
    calls: list[str] = []
    space = {"_reach": type("Recorder", (), {"called": calls.append})}
    exec(compile(text, "it.py", "exec"), space)
    assert space["twice"](4) == 8
    assert calls == ["qwench/it.py:4", "qwench/it.py:6"]


def test_the_quickest_tests_of_a_function_try_its_change() -> None:
    seconds = {"slow": 9.0, "quick": 1.0, "other": 2.0, "longest": 30.0}
    functions = {"it.py:4": ["slow", "quick", "longest"], "it.py:6": ["other", "failed"]}
    whole = Reach(seconds | {"no": 1.0, "tests/a.py::one": 3.0}, functions | {"it.pyx:1": ["no"]})
    reach = whole.part(Path("it.py"))
    assert reach == Reach(seconds, functions)
    assert whole.part(Path("it.py"), ["tests/a.py"]) == Reach(seconds | {"tests/a.py::one": 3.0}, functions)
    assert reach.of_function(Path("it.py"), SOURCE, line=8) == ["slow", "quick", "longest"]
    assert reach.of_function(Path("it.py"), SOURCE, line=7) == ["other", "failed"], "the inner function"
    assert reach.of_function(Path("it.py"), SOURCE, line=10) == [*seconds], "outside of functions"
    assert reach.quickest(["slow", "failed", "longest", "other", "quick"], limit_s=12.5) == ["quick", "other", "slow"]
    suites = Reach({"tests/a.py::TestB::one": 31.0, "tests/c.py::two": 40.0, "tests/d.py::three": 30.0}, {})
    assert suites.suite(suites.seconds, limit_s=30.0) == ["tests/a.py"]
    assert reach.suite(seconds, limit_s=30.0) == []


def test_times_are_kept_by_the_names_that_tests_are_run_by(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    cases = [
        '<testcase classname="tests.a.test_b" name="test_c[d]" time="1.5"/>',
        '<testcase classname="tests.a.test_b.TestE" name="test_f" time="2.5"/>',
        '<testcase classname="tests.a.test_b" name="test_g" time="1"><failure/></testcase>',
    ]
    report.write_text(f"<testsuites>{''.join(cases)}</testsuites>")
    assert _seconds_of(report) == {"tests/a/test_b.py::test_c[d]": 1.5, "tests/a/test_b.py::TestE::test_f": 2.5}


@pytest.mark.parametrize(("seconds", "noticed"), [(1.0, True), (120.0, False)])
def test_a_module_that_cannot_be_imported_is_noticed_though_another_test_fails_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, noticed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    module = Path("it.py")
    module.write_text(SOURCE)
    names = ["tests/unit/a.py::test", "tests/unit/fails_anyway.py::test"]

    def outcome(tests: list[str], timeout_s: float) -> Outcome:
        is_changed = "number / 2" in module.read_text()
        return Outcome(not is_changed and names[1] not in tests, seconds)

    monkeypatch.setattr(mutations, "outcome", outcome)
    [place] = [place for place in places_of(SOURCE) if mutant_of(SOURCE, place).after == "number / 2"]
    counts = Campaign(module, [[]], Reach(dict.fromkeys(names, 1.0), {"it.py:6": names})).run([place])
    assert counts == {"unit": int(noticed), "tried": 1}


def test_what_no_unit_test_notices_is_tried_on_recorded_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module = Path("it.py")
    module.write_text(SOURCE)

    found = {"unit": "number / 2", "tests/e2e/a.py::test": "if not item", "tests/e2e/broken.py::test": ""}

    def outcome(tests: list[str], timeout_s: float) -> Outcome:
        failed = [test for test in tests if found[test] in module.read_text()]
        return Outcome(not failed, 1.0, failed[0] if failed else "")

    monkeypatch.setattr(mutations, "outcome", outcome)
    names = ["tests/e2e/broken.py::test", "tests/e2e/a.py::test"]
    reach = Reach(dict.fromkeys(names, 1.0), {"it.py:6": names})
    counts = Campaign(module, [["unit"]], reach).run([place for place in places_of(SOURCE) if place.line in (7, 10)])
    assert counts == {"unit": 1, "contract or e2e": 1, "tried": 5}
    printed = capsys.readouterr().out
    assert (
        "it.py:10 negated filter: for item in () if item -> for item in () if not item (noticed by contract or e2e)" in printed
    )
    assert "it.py:7 off by one: 2 -> 3\n" in printed
    assert module.read_text() == SOURCE and module.stat().st_mtime < 1000
