"""How many small changes of the package's code its tests notice. Run by hand; it prints the changes that no test noticed.

    python -m tests.campaigns.mutations qwench/rewards/pool.py --sample 20           20 changes of this module
    python -m tests.campaigns.mutations qwench/rewards --total 25 --seed 3           25 changes of all modules below a folder
    python -m tests.campaigns.mutations qwench/samples.py --tests tests/unit/rollout/test_groups.py

A change is tried on the module's mirror in tests/unit. The other test files of its folder, and those that import it, then
try the changes which the mirror did not notice. `--tests` names other files in place of both: needed where e2e tests alone
run the module. The tests run on a copy of the tree. Every change runs in a fork of a process that has imported the heavy
libraries. `--jobs` tries several modules at once, each job on its own copy. Read each change that is printed: a test is
missing, the code does nothing, or the change has no effect.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from tests.campaigns.changes import changes_of, code_of

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torch.distributed", "transformers", "hypothesis", "sympy", "aiohttp", "fastapi", "uvicorn")


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
    return [
        Place(index, number, getattr(node, "lineno", 0)) for index, node in nodes for number, _ in enumerate(changes_of(node))
    ]


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


def tests_of(module: Path) -> list[str]:
    """Return the mirror of a module in tests/unit, or else the tests that import it, or else its folder's tests."""
    folder = Path("tests/unit") / module.parent.relative_to("qwench")
    own = folder / f"test_{module.name}"
    if (ROOT / own).exists():
        return [str(own)]
    while not (ROOT / folder).exists():
        folder = folder.parent
    return importers_of(module) or [str(folder)]


def importers_of(module: Path) -> list[str]:
    """Return the files of tests/unit that import a module."""
    name = re.escape(".".join(module.with_suffix("").parts).removesuffix(".__init__"))
    package, _, last = name.rpartition(r"\.")
    imports = re.compile(rf"^\s*(from {name} import|import {name}\b|from {package} import .*\b{last}\b)", re.MULTILINE)
    files = sorted((ROOT / "tests/unit").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if imports.search(file.read_text())]


def outcome(tests: list[str], timeout_s: float) -> tuple[bool, float]:
    """Return whether the tests pass in a fork of this process, and the seconds they took; out of time they fail."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _run_tests(tests)
    while time.monotonic() - started < timeout_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0, time.monotonic() - started
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, timeout_s


def _run_tests(tests: list[str]) -> None:
    code = 1
    try:
        os.setsid()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        code = int(pytest.main(["-x", "-q", "--hypothesis-profile", "first failure", *tests]))
    finally:
        os._exit(code)


def campaign(module: Path, places: list[Place], stages: list[list[str]]) -> tuple[int, int]:
    """Run the stages of tests on changes of a module; return the numbers noticed and tried, and print what no stage noticed."""
    original = module.read_text()
    usual_s: dict[int, float] = {}
    noticed = 0
    for place in places:
        mutant = mutant_of(original, place)
        for number, tests in enumerate(stages):
            module.write_text(original)
            if number not in usual_s:
                passed, usual_s[number] = outcome(tests, 600)
                if not passed:
                    print(f"{module}: left out, {' '.join(tests)} fail without a change", flush=True)
                    return 0, 0
            module.write_text(mutant.source)
            unnoticed, _ = outcome(tests, 3 * usual_s[number] + 20)
            if not unnoticed:
                noticed += 1
                break
        else:
            print(f"  {module}:{mutant.line} {mutant.kind}: {_short(mutant.before)} -> {_short(mutant.after)}", flush=True)
    module.write_text(original)
    seconds = ", ".join(f"{seconds:.1f}" for seconds in usual_s.values())
    print(f"{module}: {noticed} of {len(places)} noticed by {' '.join(stages[0])} ({seconds} s a run)", flush=True)
    return noticed, len(places)


def stages_of(module: Path) -> list[list[str]]:
    """Return the tests to try first, and those for the changes that the first ones did not notice."""
    first = tests_of(module)
    neighbours = [str(path) for path in sorted(Path("tests/unit").joinpath(*module.parts[1:-1]).glob("test_*.py"))]
    others = sorted({*importers_of(module), *neighbours} - set(first))
    return [first, others] if others else [first]


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
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info"))
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
    parser.add_argument("--sample", type=int, default=0, help="changes per module; 0: all of them")
    parser.add_argument("--total", type=int, default=0, help="changes of all modules together; 0: no bound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs=2, default=(0, 10**6), help="first and last line to change")
    parser.add_argument("--jobs", type=int, default=1, help="modules at once")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in HEAVY:
        import_module(name)
    os.chdir(ROOT)
    modules = [file for path in args.modules for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    places = sorted(chosen(modules, args).items(), key=lambda item: -len(item[1]))
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.jobs, fork, initializer=enter_copy, initargs=(Path(folder),)) as pool,
    ):
        runs = [
            pool.submit(campaign, module, some, [args.tests] if args.tests else stages_of(module)) for module, some in places
        ]
        counts = [run.result() for run in as_completed(runs)]
    noticed, tried = sum(noticed for noticed, _ in counts), sum(tried for _, tried in counts)
    print(f"{noticed} of {tried} noticed: {noticed / max(tried, 1):.1%}")


if __name__ == "__main__":
    main()
