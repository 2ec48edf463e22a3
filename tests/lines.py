"""Measure which lines of the package run: `pytest -p tests.lines`, then `coverage report`.

Before Python 3.12 a tracer costs a third of what the tests cost. SlipCover puts a probe before each line instead; coverage.py
keeps and shows the result. Lines count that run in the session or in its forks (`tests.workers`). Ranks, servers and reward
workers are processes of their own, and do not count.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path

import coverage
import pytest
import slipcover
from coverage.data import CoverageData

PACKAGE = Path(__file__).parents[1] / "qwench"


class Lines:
    """The lines that ran in this process, and in the process that forked it."""

    def __init__(self) -> None:
        self._session, self._folder = os.getpid(), Path.cwd()
        self._report = coverage.Coverage()
        self._report.erase()
        # Probes cost 10 ns and stay: removal would walk the frames of all threads. The report knows the lines to exclude.
        self._seen = slipcover.Slipcover(d_miss_threshold=-1, exclude_lines=[])
        slipcover.ImportManager(self._seen, slipcover.FileMatcher(sources=[PACKAGE])).__enter__()
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
