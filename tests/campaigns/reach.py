"""Which contract and e2e tests run which functions of the package, also in processes that they start.

    python -m tests.campaigns.reach FILE       once, for `python -m tests.campaigns.mutations --reach FILE`

The tests run on a copy of the tree, in which each function says the first time that a test calls it. Workers that get no
environment, as those of rewards, do not know their test and say nothing.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/contract", "tests/e2e")
Function = ast.FunctionDef | ast.AsyncFunctionDef
_BEGIN_S = 0.05
"""To find and begin a test."""
_RECORDER = """
import os

_SEEN = set()


def called(function):
    test = os.environ.get("PYTEST_CURRENT_TEST")
    if test and (test, function) not in _SEEN:
        _SEEN.add((test, function))
        name, _, phase = test.rpartition(" ")
        who = name.partition("::")[0] if phase == "(setup)" else name  # what is set up may serve all tests of a file
        with open({path!r}, "a") as file:
            file.write(who + "\\t" + function + "\\n")
"""


@dataclass(frozen=True)
class Reach:
    """What a recording has seen."""

    seconds: Mapping[str, float]
    """How long each test that passed took, with what was set up for it."""
    tests: Mapping[str, Sequence[str]]
    """The tests of each function, which is named by its module and where it begins: qwench/files.py:31."""

    def of_function(self, module: Path, source: str, line: int) -> list[str]:
        """Return the tests that run the function around a line of a module's source; outside of functions all."""
        around = [node for node in functions_of(ast.parse(source)) if node.lineno <= line <= (node.end_lineno or 0)]
        return list(self.tests.get(f"{module}:{around[-1].lineno}", ()) if around else self.seconds)

    def part(self, module: Path, files: Collection[str] = ()) -> Reach:
        """Return what was seen of a module, and how long tests in some files took."""
        tests = {name: some for name, some in self.tests.items() if name.startswith(f"{module}:")}
        called = {test for some in tests.values() for test in some}
        kept = {test: took for test, took in self.seconds.items() if test in called or test.partition("::")[0] in files}
        return Reach(kept, tests)

    def quickest(self, tests: Iterable[str], limit_s: float) -> list[str]:
        """Return those of the tests that passed and take no longer together."""
        chosen, total_s = [], 0.0
        for test in self._passed(tests):
            total_s += self.seconds[test] + _BEGIN_S
            if total_s <= limit_s:
                chosen.append(test)
        return chosen

    def suite(self, tests: Iterable[str], limit_s: float) -> list[str]:
        """Return the file of the quickest test that takes longer: it makes what the others of its file look at too."""
        return [test.partition("::")[0] for test in self._passed(tests) if self.seconds[test] > limit_s][:1]

    def _passed(self, tests: Iterable[str]) -> list[str]:
        return sorted(set(tests) & self.seconds.keys(), key=lambda test: (self.seconds[test], test))

    @classmethod
    def load(cls, path: Path) -> Reach:
        """Read a recording."""
        return cls(**json.loads(path.read_text()))


def functions_of(tree: ast.AST) -> list[Function]:
    """Return the functions, each before those inside it."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def with_calls(source: str, module: str) -> str:
    """Return a module whose functions say that they are called. Kernels are compiled from their source, and stay."""
    tree = ast.parse(source)
    for node in functions_of(tree):
        if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            begin = 1 if ast.get_docstring(node, clean=False) is not None else 0
            node.body.insert(begin, ast.parse(f"_reach.called({f'{module}:{node.lineno}'!r})").body[0])
    begin = 0
    while begin < len(tree.body) and _stands_first(tree.body[begin]):
        begin += 1
    tree.body.insert(begin, ast.parse("from qwench import _reach").body[0])
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _stands_first(node: ast.stmt) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def record(tree: Path, folder: Path, tests: Sequence[str], workers: int) -> Reach:
    """Run tests on a copy of the tree that is there for it; files go into the folder."""
    calls, report = folder / "calls", folder / "report.xml"
    calls.touch()
    for path in sorted((tree / "qwench").rglob("*.py")):
        path.write_text(with_calls(path.read_text(), str(path.relative_to(tree))))
    (tree / "qwench/_reach.py").write_text(_RECORDER.format(path=str(calls)))
    words = ["-m", "pytest", "-p", "tests.workers", "--workers", str(workers), f"--junitxml={report}", *tests]
    subprocess.run(
        [sys.executable, *words], cwd=tree, env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}, check=False
    )
    seconds, found, of_file = _seconds_of(report), defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for test in seconds:
        of_file[test.partition("::")[0]].add(test)
    for line in calls.read_text().splitlines():
        test, function = line.split("\t")
        found[function] |= {test} if "::" in test else of_file[test]
    return Reach(seconds, {function: sorted(tests) for function, tests in sorted(found.items())})


def _seconds_of(report: Path) -> dict[str, float]:
    cases = ElementTree.parse(report).iter("testcase")
    return {
        f"{_file_and_class(case.attrib['classname'])}::{case.attrib['name']}": float(case.attrib["time"])
        for case in cases
        if case.find("failure") is None and case.find("error") is None
    }


def _file_and_class(name: str) -> str:
    """Return tests/a.py of tests.a, and tests/a.py::TestB of tests.a.TestB, as pytest names them."""
    module, _, last = name.rpartition(".")
    is_class = last[:1].isupper()
    return f"{(module if is_class else name).replace('.', '/')}.py" + (f"::{last}" if is_class else "")


def copy_tree(tree: Path) -> None:
    """Copy what tests need of the repository."""
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info"))


def main() -> None:
    """Record the tests of contracts and of whole runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tests", nargs="+", default=FOLDERS)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder) / "tree")
        reach = record(Path(folder) / "tree", Path(folder), args.tests, args.workers)
    args.file.write_text(json.dumps({"seconds": reach.seconds, "tests": reach.tests}))
    print(f"{len(reach.seconds)} tests that passed, {len(reach.tests)} functions")


if __name__ == "__main__":
    main()
