"""Functions of the user's own: where they are found, and that nothing else is found there by accident."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import sys
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest

import qwench
from qwench import plugins
from qwench.errors import ConfigError, QwenchError, RewardError
from qwench.plugins import guarded, is_function_path, is_loaded, load_function, place_in_stack, place_of, raised_at


@pytest.fixture(autouse=True)
def own_search_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(path: str, **options):
    return load_function(path, flag="--some-path", **options)


@pytest.mark.parametrize("path", ["a.b", "a.b.c", "./a.py:f", "/x/a.py:f", "a b/c.py:f"])
def test_forms_of_a_path(path: str) -> None:
    assert is_function_path(path)


@pytest.mark.parametrize("path", ["a", "./a.py", "a.py:", "a.py:1", "a.txt:f", "a..b", ".a.b", "a:b", ""])
def test_what_is_no_path_of_a_function(path: str) -> None:
    assert not is_function_path(path)


def test_a_file_is_one_module_under_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("CALLS = []\n\ndef f(x):\n    return CALLS\n\ndef g(x):\n    return CALLS\n")
    monkeypatch.chdir(tmp_path)
    assert load("./mine.py:f")(1) is load(f"{tmp_path}/mine.py:g")(1)


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def f(x):\n    return {folder!r}\n")
    assert [load(f"{tmp_path}/{folder}/mine.py:f")(1) for folder in ("a", "b")] == ["a", "b"]


def test_a_file_of_the_working_folder_shadows_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fractions.py").write_text("raise SystemExit('the user has a fractions.py too')\n")
    (tmp_path / "halves.py").write_text("from fractions import Fraction\n\ndef f(x):\n    return Fraction(x, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "fractions", raising=False)
    assert str(load("halves.f")(1)) == "1/2"
    assert sys.path[-1] == str(tmp_path)


def test_a_file_that_failed_can_be_mended_and_loaded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise KeyError('not yet')\n")
    with pytest.raises(ConfigError, match=r"--some-path .* cannot be imported \(KeyError: 'not yet', at .*mine\.py:1\)"):
        load(f"{tmp_path}/mine.py:f")
    (tmp_path / "mine.py").write_text("def f(x):\n    return 'now it works'\n")
    assert load(f"{tmp_path}/mine.py:f")(1) == "now it works"


def test_a_misspelt_function_is_told_with_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from math import sqrt\n\ndef score(x):\n    return x\n\nclass Judge: ...\n\ndef _hidden(): ...\n")
    with pytest.raises(ConfigError) as refused:
        load(f"{file}:scor")
    assert str(refused.value) == f"--some-path '{file}:scor': {file} has no 'scor'; it defines: score, Judge"


def test_a_file_that_ends_the_process_is_the_users_mistake(tmp_path: Path) -> None:
    file = tmp_path / "ends.py"
    file.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match=r"cannot be imported \(SystemExit: 0, at .*ends\.py:2\)"):
        load(f"{file}:f")


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_what_a_function_raises_is_one_line_with_its_place(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"{kind[:3]}.py"
    file.write_text(f"import sys\n\n\n{kind} fails(x):\n    return 1 / x\n\n\n{kind} ends(x):\n    sys.exit(x)\n")

    def call(name: str) -> None:
        path = f"{file}:{name}"
        answer = guarded(load(path), path=path, flag="--some-path")(0)
        if inspect.isawaitable(answer):
            asyncio.run(_awaited(answer))

    with pytest.raises(
        QwenchError, match=rf"--some-path '.*:fails' failed: ZeroDivisionError: .* \({re.escape(str(file))}:5\)"
    ):
        call("fails")
    with pytest.raises(QwenchError, match=rf"SystemExit: 0 \({re.escape(str(file))}:9\)"):
        call("ends")


def test_an_error_of_qwench_passes_as_it_is() -> None:
    def refuses(x: object) -> None:
        raise RewardError("no reward")

    async def refuses_later(x: object) -> None:
        raise RewardError("no reward")

    with pytest.raises(RewardError, match=r"^no reward$"):
        guarded(refuses, path="a.b", flag="--some-path")(0)
    with pytest.raises(RewardError, match=r"^no reward$"):
        asyncio.run(_awaited(guarded(refuses_later, path="a.b", flag="--some-path")(0)))


def test_an_interruption_while_a_module_is_imported_is_no_fault_of_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(f"{tmp_path}/mine.py:f")


async def _awaited(answer: Awaitable[object]) -> object:
    return await answer


def test_a_function_without_a_signature_is_taken_as_it_is() -> None:
    assert load("builtins.max", num_arguments=2) is max


def test_a_signature_is_checked(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(x, y):\n    pass\n")
    load(f"{tmp_path}/mine.py:f", num_arguments=2)
    with pytest.raises(ConfigError, match=r"has the signature \(x, y\), but is called as fn\(samples\)"):
        load(f"{tmp_path}/mine.py:f")


def test_places_are_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("\ndef f(x):\n    return g(x)\n\ndef g(x):\n    return int(x)\n")
    function = load(f"{tmp_path}/mine.py:f")
    assert place_of(function) == f"{tmp_path}/mine.py:2"
    with pytest.raises(ValueError, match="invalid literal") as raised:
        function("x")
    assert raised_at(raised.value) == f"{tmp_path}/mine.py:6"
    assert place_of(len) == "a file that is not Python"


def test_no_child_process_looks_for_modules_in_the_working_folder_first() -> None:
    after = [
        words[i + 1]
        for path in Path(qwench.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.List | ast.Tuple) and len(words := [ast.unparse(item) for item in node.elts]) > 1
        for i, word in enumerate(words[:-1])
        if word == "sys.executable"
    ]
    assert len(after) >= 8
    assert set(after) <= {"'-P'", "'-EP'"}


def test_a_signature_that_takes_anything_is_said_not_to_be_checked(tmp_path, caplog):
    file = tmp_path / "anything.py"
    file.write_text("def score(*args, **kwargs):\n    return 1\n\n\ndef exact(sample):\n    return 1\n")
    load_function(f"{file}:score", flag="--custom-rm-path", called_as="fn(sample)")
    assert f"at {file}:1 takes any arguments, so its signature cannot be checked; it is called as fn(sample)" in caplog.text
    caplog.clear()
    load_function(f"{file}:exact", flag="--custom-rm-path", called_as="fn(sample)")
    assert caplog.text == ""


def test_a_signature_with_a_name_is_checked_and_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.py").write_text("def f(x, *rest):\n    pass\n")
    load(f"{tmp_path}/mine.py:f")
    assert caplog.messages == []


def test_an_error_of_syntax_is_where_the_file_has_it_or_where_it_was_raised(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(ConfigError, match=rf"\(SyntaxError: .*, at {tmp_path}/mine\.py:2\)"):
        load(f"{tmp_path}/mine.py:f")
    (tmp_path / "raising.py").write_text('def f(x):\n    raise SyntaxError("odd")\n')
    with pytest.raises(SyntaxError) as raised:
        load(f"{tmp_path}/raising.py:f")(0)
    assert raised_at(raised.value) == f"{tmp_path}/raising.py:2"
    assert raised_at(ValueError("never raised")) is None


def test_the_innermost_frame_of_the_users_code_is_found_in_a_stack() -> None:
    stack = f"""Fatal Python error: Segmentation fault
  File "{plugins.__file__}", line 3 in guarded
  File "{inspect.__file__}", line 4 in bind
  File "<string>", line 5 in made
  File "/home/me/reward.py", line 7 in score
  File "/home/me/main.py", line 9 in run
"""
    assert place_in_stack(stack) == "/home/me/reward.py:7 in score"
    assert place_in_stack(stack.replace("/home/me", "<frozen")) is None


def test_a_module_is_loaded_once_its_function_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(x):\n    pass\n")
    path = f"{tmp_path}/mine.py:f"
    assert not is_loaded(path)
    load(path)
    assert is_loaded(path) and is_loaded("json.loads") and not is_loaded("no_such_module.loads")


def test_a_file_finds_its_neighbours_and_one_that_is_not_there_is_named(tmp_path):
    (tmp_path / "helper_beside_it.py").write_text("SCORE = 0.25\n")
    (tmp_path / "mine.py").write_text(
        "from helper_beside_it import SCORE\n\nNUMBER = 3\n\n\ndef fn(samples):\n    return SCORE\n"
    )
    assert load_function(f"{tmp_path}/mine.py:fn", flag="--f")([]) == 0.25
    with pytest.raises(ConfigError, match=r"^--f '.*mine\.py:NUMBER' is no function but a int\.$"):
        load_function(f"{tmp_path}/mine.py:NUMBER", flag="--f")
    with pytest.raises(ConfigError, match=rf"cannot be imported \(FileNotFoundError: there is no file {tmp_path}/none\.py\)"):
        load_function(f"{tmp_path}/none.py:fn", flag="--f")


def test_compiled_code_whose_arguments_are_not_known_is_taken_with_a_warning(caplog):
    assert load_function("builtins.dict", flag="--f") is dict
    assert caplog.messages == [
        "--f 'builtins.dict' at a file that is not Python takes any arguments, so its signature cannot be checked; "
        "it is called as fn(samples)"
    ]


def test_an_error_below_the_users_code_is_at_their_line():
    with pytest.raises(ValueError, match="Expecting") as raised:
        json.loads("{")
    assert raised_at(raised.value) == f"{__file__}:{raised.tb.tb_lineno}"
