"""How many small changes of a module its tests notice. Run by hand; it prints the changes that no test noticed.

    python -m tests.campaigns.mutations qwench/rewards/pool.py --sample 20
    python -m tests.campaigns.mutations qwench/samples.py --tests tests/unit/rollout/test_groups.py

The tests run on a copy of the tree. Every change runs in a fork of a process that has imported the heavy libraries.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
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


def mutants_of(source: str) -> Iterator[Mutant]:
    """Return every change of a module."""
    tree = ast.parse(source)
    for index, node in enumerate(code_of(tree)):
        for number, (kind, _) in enumerate(changes_of(node)):
            changed = copy.deepcopy(tree)
            target = list(code_of(changed))[index]
            replacement = list(changes_of(target))[number][1]
            _Replace(target, replacement).visit(changed)
            line = getattr(node, "lineno", 0)
            shown = ast.unparse(replacement) if replacement is not None else "(removed)"
            yield Mutant(line, kind, ast.unparse(ast.fix_missing_locations(changed)), ast.unparse(node), shown)


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, replacement: ast.AST | None) -> None:
        self._target, self._replacement = target, replacement

    def visit(self, node: ast.AST) -> ast.AST | None:
        return self._replacement if node is self._target else self.generic_visit(node)


def tests_of(module: Path) -> list[str]:
    """Return the mirror of a module in tests/unit; its folder's tests where it has no file of its name."""
    folder = Path("tests/unit") / module.parent.relative_to("qwench")
    own = folder / f"test_{module.name}"
    while not (ROOT / own).exists() and not (ROOT / folder).exists():
        folder = folder.parent
    return [str(own if (ROOT / own).exists() else folder)]


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
        code = int(pytest.main(["-x", "-q", "-p", "no:xdist", "--hypothesis-profile", "first failure", *tests]))
    finally:
        os._exit(code)


def campaign(module: Path, tests: list[str], *, sample: int, seed: int, first: int, last: int) -> tuple[int, int]:
    """Run the tests on a sample of a module's changes; return the numbers noticed and tried."""
    original = module.read_text()
    mutants = [mutant for mutant in mutants_of(original) if first <= mutant.line <= last]
    if sample and sample < len(mutants):
        mutants = sorted(random.Random(seed).sample(mutants, sample), key=lambda mutant: mutant.line)
    passed, usual_s = outcome(tests, 600)
    if not passed:
        sys.exit(f"{tests} fail without a change")
    noticed = 0
    for mutant in mutants:
        module.write_text(mutant.source)
        unnoticed, _ = outcome(tests, 3 * usual_s + 20)
        noticed += not unnoticed
        if unnoticed:
            print(f"  {module}:{mutant.line} {mutant.kind}: {_short(mutant.before)} -> {_short(mutant.after)}", flush=True)
    module.write_text(original)
    print(f"{module}: {noticed} of {len(mutants)} noticed by {' '.join(tests)} ({usual_s:.1f} s a run)", flush=True)
    return noticed, len(mutants)


def _short(code: str) -> str:
    line = " ".join(code.split())
    return line if len(line) < 100 else line[:97] + "..."


def main() -> None:
    """Copy the tree, run the campaign in it for every module, print the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", type=Path)
    parser.add_argument("--tests", nargs="+", help="test files to run; default: the module's mirror in tests/unit")
    parser.add_argument("--sample", type=int, default=0, help="changes per module; 0: all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs=2, default=(0, 10**6), help="first and last line to change")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in HEAVY:
        import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info"))
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]
        counts = [
            campaign(
                module,
                args.tests or tests_of(module),
                sample=args.sample,
                seed=args.seed,
                first=args.lines[0],
                last=args.lines[1],
            )
            for module in args.modules
        ]
    noticed, tried = (sum(column) for column in zip(*counts, strict=True))
    print(f"{noticed} of {tried} noticed: {noticed / max(tried, 1):.1%}")


if __name__ == "__main__":
    main()
