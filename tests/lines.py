"""Measure which lines of the package run: `pytest -p tests.lines`, then `coverage report`.

Before Python 3.12 a tracer costs a third of what the tests cost. SlipCover puts a probe before each line instead; coverage.py
keeps and shows the result. Lines count that run in the session or in its forks (`tests.workers`). Ranks, servers and reward
workers are processes of their own, and do not count.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import coverage
import pytest
import slipcover
from coverage.data import CoverageData

PACKAGE = Path(__file__).parents[1] / "qwench"


class Finder(MetaPathFinder):
    """Finds the modules of the package, and puts probes into them. It is on no stack while other modules are imported."""

    def __init__(self, seen: slipcover.Slipcover) -> None:
        self._seen = seen

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a module of the package is; None: it is of another one."""
        if name.partition(".")[0] != PACKAGE.name:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = Loader(self._seen, spec.loader)
        return spec


class Loader(SourceFileLoader):
    """Loads a module with probes."""

    def __init__(self, seen: slipcover.Slipcover, plain: SourceFileLoader) -> None:
        super().__init__(plain.name, plain.path)
        self._seen = seen

    def get_code(self, fullname: str) -> CodeType:
        """Return the code that the import runs."""
        return self._seen.instrument(super().get_code(fullname))


class Lines:
    """The lines that ran in this process, and in the process that forked it."""

    def __init__(self) -> None:
        self._session, self._folder = os.getpid(), Path.cwd()
        self._report = coverage.Coverage()
        self._report.erase()
        # Probes cost 10 ns and stay: removal would walk the frames of all threads. The report knows the lines to exclude.
        self._seen = slipcover.Slipcover(d_miss_threshold=-1, exclude_lines=[])
        sys.meta_path.insert(0, Finder(self._seen))
        atexit.register(self._end_fork)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the lines of this process, and put them together with those of its forks."""
        self._write()
        self._report.combine()
        self._report.save()

    def _end_fork(self) -> None:
        if os.getpid() != self._session:
            self._write()

    def _write(self) -> None:
        os.chdir(self._folder)  # SlipCover names files from here
        files = self._seen.get_coverage()["files"]
        data = CoverageData(self._report.config.data_file, suffix=True)
        data.add_lines({str(self._folder / name): lines["executed_lines"] for name, lines in files.items()})
        data.touch_files([str(file) for file in PACKAGE.rglob("*.py")])
        data.write()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Begin before the first import of the package."""
    early_config.pluginmanager.register(Lines(), "lines")
