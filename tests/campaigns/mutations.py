"""How many small changes of the package's code its tests notice. Run by hand; it prints the changes that no test noticed.

    python -m tests.campaigns.mutations qwench/rewards/pool.py --sample 20           20 changes of this module
    python -m tests.campaigns.mutations qwench/rewards --total 25 --seed 3           25 changes of all modules below a folder
    python -m tests.campaigns.mutations qwench/samples.py --tests tests/unit/rollout/test_groups.py

A change is tried on the module's mirror in tests/unit, and on the rules of all sources. The other test files of its folder,
and those that import it, then try the changes which these did not notice. With `--reach FILE` (see `reach.py`) all other tests
that run the changed function try what is left, the quickest first, up to 30 s of each kind, and then one file with a test that
takes longer. `--tests` names other files in place of all that.

The tests run on a copy of the tree. Every change runs in a fork of a process that has imported the heavy libraries. `--jobs`
tries several modules at once, each job on its own copy. Read each change that is printed: a test is missing, the code does
nothing, or the change has no effect.
"""

from __future__ import annotations

import argparse
import ast
import gc
import multiprocessing
import os
import random
import re
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from tests.campaigns.changes import changes_of, code_of
from tests.campaigns.reach import Reach, copy_tree

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torch.distributed", "transformers", "hypothesis", "sympy", "aiohttp", "fastapi", "uvicorn")
READS_ALL = "tests/unit/test_source.py"
"""Reads the source of every module."""
LIMIT_S = 30.0
"""How long the recorded tests of one change take."""
SUITE_LIMIT_S = 600.0
_GRACE_S = 2.0
"""How long forks that tests have left may go on. The pipe closes when the last one ends."""


class FailingTestsError(Exception):
    """Tests fail without a change."""


@dataclass(frozen=True)
class Mutant:
    """The source of a module with one change in it."""

    line: int
    kind: str
    source: str
    before: str
    after: str


@dataclass(frozen=True)
class Place:
    """A change that can be made: which node of the module's code, and which of the node's changes."""

    node: int
    change: int
    line: int


def places_of(source: str) -> list[Place]:
    """Return the place of every change of a module."""
    nodes = enumerate(code_of(ast.parse(source)))
    return [Place(index, number, _line_of(node)) for index, node in nodes for number, _ in enumerate(changes_of(node))]


def _line_of(node: ast.AST) -> int:
    """Return where a node begins; a comprehension says it of its target alone."""
    return getattr(node.target if isinstance(node, ast.comprehension) else node, "lineno", 0)


def mutant_of(source: str, place: Place) -> Mutant:
    """Make one change of a module."""
    tree = ast.parse(source)
    target = list(code_of(tree))[place.node]
    before = ast.unparse(target)
    kind, replacement = list(changes_of(target))[place.change]
    after = ast.unparse(replacement) if replacement is not None else "(removed)"
    _Replace(target, replacement).visit(tree)
    return Mutant(place.line, kind, ast.unparse(ast.fix_missing_locations(tree)), before, after)


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, replacement: ast.AST | None) -> None:
        self._target, self._replacement = target, replacement

    def visit(self, node: ast.AST) -> ast.AST | None:
        return self._replacement if node is self._target else self.generic_visit(node)


def importers_of(module: Path) -> list[str]:
    """Return the files of tests/unit that import a module."""
    name = re.escape(".".join(module.with_suffix("").parts).removesuffix(".__init__"))
    package, _, last = name.rpartition(r"\.")
    imports = re.compile(rf"^\s*(from {name} import|import {name}\b|from {package} import .*\b{last}\b)", re.MULTILINE)
    files = sorted((ROOT / "tests/unit").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if imports.search(file.read_text())]


@dataclass(frozen=True)
class Outcome:
    """What a run of tests in a fork of this process has given."""

    passed: bool
    seconds: float
    failed: str = ""
    """The test that failed; empty where all passed, or where none ended before the deadline."""


def outcome(tests: list[str], timeout_s: float) -> Outcome:
    """Run tests up to the first that fails. Out of time they fail.

    A fork that a test makes and that goes on with the tests after it fails too: only its own result tells what the test saw.
    """
    started = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _run_tests(tests, writer)
    os.close(writer)
    code: int | None = None
    while code is None and time.monotonic() - started < timeout_s:
        done, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.02)
    seconds = time.monotonic() - started
    said = os.read(reader, 4096) if select.select([reader], [], [], _GRACE_S if code == 0 else 0)[0] else b""
    os.close(reader)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what tests have left behind would run beside the next change
    if code is None:
        os.waitpid(child, 0)
    return Outcome(code == 0 and not said, seconds, said.decode().partition("\n")[0])


class _Teller:
    """Plugin that runs the named tests, if they are still there, and writes which failed, also in a fork that a test made."""

    def __init__(self, writer: int, tests: list[str]) -> None:
        self._writer, self._named = writer, {test: number for number, test in enumerate(tests) if "::" in test}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = {test.partition("::")[0] for test in self._named}
        left = [item for item in items if item.nodeid in self._named or item.nodeid.partition("::")[0] not in files]
        items[:] = sorted(left, key=lambda item: self._named.get(item.nodeid, len(self._named)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self._writer, f"{report.nodeid}\n".encode())


def _run_tests(tests: list[str], writer: int) -> None:
    code = 1
    gc.freeze()  # what the process before the fork has left may end only with threads that a fork has not
    try:
        os.setsid()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        places = [place for place in dict.fromkeys(test.partition("::")[0] for test in tests) if Path(place).exists()]
        code = int(pytest.main(["-x", "-q", "--hypothesis-profile", "first failure", *places], [_Teller(writer, tests)]))
        code = 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code  # all were renamed since they were recorded
    finally:
        os._exit(code)


class Campaign:
    """The changes of one module, and the tests that try them."""

    def __init__(self, module: Path, stages: list[list[str]], reach: Reach | None) -> None:
        self._module, self._stages, self._reach = module, stages, reach
        self._original = module.read_text()
        self._usual_s: dict[str, float] = {}
        self._changes = 0

    def run(self, places: list[Place]) -> Counter[str]:
        """Try changes and print those that no test noticed; return how many were tried, and noticed by which kind of test."""
        counts: Counter[str] = Counter(unit=0, tried=0)
        for place in places:
            mutant = mutant_of(self._original, place)
            try:
                seen = self._notice(mutant)
            except FailingTestsError as error:
                print(f"{self._module}: left out, {error} fail without a change", flush=True)
                return Counter()
            counts.update({"tried": 1, seen: 1} if seen else {"tried": 1})
            if seen != "unit":
                said = f"{mutant.kind}: {_short(mutant.before)} -> {_short(mutant.after)}"
                print(f"  {self._module}:{mutant.line} {said}" + (f" (noticed by {seen})" if seen else ""), flush=True)
        self._write(self._original)
        seconds = ", ".join(f"{seconds:.1f}" for seconds in self._usual_s.values())
        print(f"{self._module}: {counts.total() - counts['tried']} of {len(places)} noticed ({seconds} s a run)", flush=True)
        return counts

    def _notice(self, mutant: Mutant) -> str:
        """Return which tests noticed a change, or nothing. What fails without the change too has noticed nothing."""
        found = self._reach.of_function(self._module, self._original, mutant.line) if self._reach else []
        stages = self._stages[:1] if found else self._stages
        if any(self._fails(mutant, tests) for tests in stages):
            return "unit"
        if self._reach is not None:
            left = [test for test in found if test.partition("::")[0] not in stages[0]]
            in_unit = [test for test in left if test.startswith("tests/unit/")]
            beside = [test for test in in_unit if test.startswith("/".join(["tests/unit", *self._module.parts[1:-1], ""]))]
            others = [test for test in left if test not in set(in_unit)]
            for name, some, limit_s in (
                ("unit", self._reach.quickest(beside, LIMIT_S), 4 * LIMIT_S),
                ("unit", self._reach.quickest(set(in_unit) - set(beside), LIMIT_S), 4 * LIMIT_S),
                ("contract or e2e", self._reach.quickest(others, LIMIT_S), 4 * LIMIT_S),
                ("contract or e2e", self._reach.suite(others, LIMIT_S), SUITE_LIMIT_S),
            ):
                if self._some_notice(mutant, some, limit_s):
                    return name
        return ""

    def _some_notice(self, mutant: Mutant, tests: list[str], limit_s: float) -> bool:
        """Run recorded tests. One that fails without the change too is left out, and the others go on."""
        while tests:
            self._write(mutant.source)
            changed = outcome(tests, limit_s)
            if changed.passed:
                return False
            self._write(self._original)
            broken = not changed.failed and changed.seconds < limit_s  # no test began: what they import cannot be imported
            if outcome([changed.failed] if changed.failed else tests[:1] if broken else tests, limit_s).passed:
                return True
            tests = tests[tests.index(changed.failed) + 1 :] if changed.failed in tests else []
        return False

    def _fails(self, mutant: Mutant, tests: list[str]) -> bool:
        key = " ".join(tests)
        if tests and key not in self._usual_s:
            self._write(self._original)
            usual = outcome(tests, 600)
            self._usual_s[key] = usual.seconds
            if not usual.passed:
                raise FailingTestsError(key)
        self._write(mutant.source)
        return bool(tests) and not outcome(tests, 3 * self._usual_s[key] + 20).passed

    def _write(self, source: str) -> None:
        """Write the module, each time with another time of its own: bytecode of the source before must not pass for its own."""
        self._module.write_text(source)
        self._changes += 1
        os.utime(self._module, (self._changes, self._changes))


def campaign(module: Path, places: list[Place], stages: list[list[str]], reach: Reach | None) -> Counter[str]:
    """Try changes of a module, in a process of the pool."""
    return Campaign(module, stages, reach).run(places)


def stages_of(module: Path) -> list[list[str]]:
    """Return the mirror of a module in tests/unit, if it has one, and then the tests that import it or lie beside that."""
    folder = Path("tests/unit") / module.parent.relative_to("qwench")
    own = [str(folder / f"test_{module.name}")] if (ROOT / folder / f"test_{module.name}").exists() else []
    others = {*importers_of(module), *map(str, folder.glob("test_*.py"))} - set(own)
    while not others and not (ROOT / folder).exists():
        folder = folder.parent
    return [[*own, READS_ALL], sorted(others) or ([] if own else [str(folder)])]


def reach_of(module: Path, reach: Reach | None) -> Reach | None:
    """Return what was seen of a module, with the tests that import it: they see what no function of it holds."""
    return reach and reach.part(module, importers_of(module))


def chosen(modules: list[Path], args: argparse.Namespace) -> dict[Path, list[Place]]:
    """Return the changes to make in every module, by line."""
    rng = random.Random(args.seed)
    first, last = args.lines
    found = {module: [place for place in places_of(module.read_text()) if first <= place.line <= last] for module in modules}
    if args.total:
        pairs = [(module, place) for module, places in found.items() for place in places]
        drawn = rng.sample(pairs, min(args.total, len(pairs)))
        found = {module: [place for owner, place in drawn if owner == module] for module in modules}
    if args.sample:
        found = {module: rng.sample(places, min(args.sample, len(places))) for module, places in found.items()}
    return {module: sorted(places, key=lambda place: place.line) for module, places in found.items() if places}


def _short(code: str) -> str:
    line = " ".join(code.split())
    return line if len(line) < 100 else line[:97] + "..."


def enter_copy(parent: Path) -> None:
    """Copy the tree, and let this process and its children import the copy."""
    tree = Path(tempfile.mkdtemp(dir=parent)) / "tree"
    copy_tree(tree)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]


def main() -> None:
    """Run the campaign for every module, on copies of the tree, and print the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", type=Path, help="modules, or folders of them")
    parser.add_argument("--tests", nargs="+", help="test files to run")
    parser.add_argument("--reach", type=Path, help="recording of the tests that run each function")
    parser.add_argument("--sample", type=int, default=0, help="changes per module; 0: all of them")
    parser.add_argument("--total", type=int, default=0, help="changes of all modules together; 0: no bound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs=2, default=(0, 10**6), help="first and last line to change")
    parser.add_argument("--jobs", type=int, default=1, help="modules at once")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in HEAVY:
        import_module(name)
    reach = Reach.load(args.reach) if args.reach else None
    os.chdir(ROOT)
    modules = [file for path in args.modules for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    places = sorted(chosen(modules, args).items(), key=lambda item: -len(item[1]))
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.jobs, fork, initializer=enter_copy, initargs=(Path(folder),)) as pool,
    ):
        runs = [
            pool.submit(campaign, module, some, [args.tests] if args.tests else stages_of(module), reach_of(module, reach))
            for module, some in places
        ]
        counts = sum((run.result() for run in as_completed(runs)), Counter())
    tried = counts.pop("tried", 0)
    print(f"{counts['unit']} of {tried} noticed by unit tests: {counts['unit'] / max(tried, 1):.1%}")
    print(f"{counts.total()} of {tried} noticed by any test: {counts.total() / max(tried, 1):.1%}")


if __name__ == "__main__":
    main()
