"""Forked test workers: outcomes reach the session whole, once, and also when a worker dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from multiprocessing import Pipe
from pathlib import Path

import pytest
from coverage import CoverageData

from tests import workers

ROOT = Path(__file__).parents[2]
TOOLS = ("__init__.py", "workers.py", "lines.py", "warm_start.py")
FILES = {
    "test_first.py": """
        import os, signal, warnings
        import pytest

        @pytest.fixture(scope="session")
        def process():
            yield os.getpid()

        @pytest.fixture(scope="module", autouse=True)
        def file():
            yield
            with open("torn", "a") as log:
                log.write("first ")

        def test_passes(process, tmp_path):
            warnings.warn("take care")

        def test_fails(process):
            print("what it said")
            assert os.getpid() == process
            assert [1] == [2]

        def test_dies():
            os.kill(os.getpid(), signal.SIGKILL)

        def test_after_a_death():
            pass

        @pytest.mark.skip(reason="not now")
        def test_skipped():
            pass
    """,
    "test_second.py": """
        import pytest

        @pytest.fixture
        def broken():
            raise ValueError("no fixture")

        def test_has_no_fixture(broken):
            pass

        def test_passes():
            pass
    """,
}


def run(folder: Path, *words: str) -> tuple[int, str, list[tuple[str, str]]]:
    """Return exit code, output, and the outcome of each test of `FILES`."""
    for name, text in FILES.items():
        (folder / name).write_text("\n".join(line[8:] for line in text.splitlines()))
    plain = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.workers", f"--rootdir={folder}", "-c", "/dev/null"]
    places = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "COVERAGE_FILE": str(folder / ".coverage"),
    }
    done = subprocess.run(
        [sys.executable, *plain, f"--junitxml={folder / 'junit.xml'}", *words, str(folder)],
        cwd=folder, env=os.environ | places, capture_output=True, text=True, check=False,
    )  # fmt: skip
    cases = ET.parse(folder / "junit.xml").iter("testcase")
    outcomes = [
        (f"{case.get('classname')}.{case.get('name')}", next((child.tag for child in case), "passed")) for case in cases
    ]
    return done.returncode, done.stdout + done.stderr, sorted(outcomes)


def test_each_test_is_reported_once_and_a_death_costs_one_test(tmp_path: Path) -> None:
    code, said, outcomes = run(tmp_path, "--workers", "2")
    assert outcomes == [
        ("test_first.test_after_a_death", "passed"),
        ("test_first.test_dies", "failure"),
        ("test_first.test_fails", "failure"),
        ("test_first.test_passes", "passed"),
        ("test_first.test_skipped", "skipped"),
        ("test_second.test_has_no_fixture", "error"),
        ("test_second.test_passes", "passed"),
    ]
    assert code == 1
    assert "2 failed, 3 passed, 1 skipped, 1 warning, 1 error" in said
    once = ("test session starts", "Captured stdout call", "UserWarning: take care", "ERROR at setup of test_has_no_fixture")
    assert [said.count(text) for text in once] == [1, 1, 1, 1], said
    assert "the worker of this test died: exit code -9" in said
    assert (tmp_path / "torn").read_text() == "first "


def test_a_worker_that_does_not_end_is_killed_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_END_TIMEOUT_S", 0.1)
    reader, _ = Pipe(duplex=False)
    with subprocess.Popen(["sleep", "600"]) as process:
        assert os.WTERMSIG(workers.Worker(process.pid, reader).wait_for_end()) == signal.SIGKILL


def test_no_test_begins_after_the_first_failure_that_ends_the_session(tmp_path: Path) -> None:
    code, said, outcomes = run(tmp_path, "--workers", "1", "-x")
    assert outcomes == [("test_first.test_fails", "failure"), ("test_first.test_passes", "passed")]
    assert (code, "stopping after 1 failures" in said) == (1, True)


def test_lines_that_ran_in_workers_are_counted(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "qwench").mkdir()
    for name in TOOLS:
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    subject = "def one():\n    return 1\n\ndef two():\n    return 2\n\ndef three():\n    return 3\n"
    for name, text in {"__init__.py": "", "idle.py": "idle = True\n", "subject.py": subject}.items():
        (tmp_path / "qwench" / name).write_text(text)
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text(f"from qwench import subject\n\ndef test_it():\n    subject.{name}()\n")
    run(tmp_path, "--workers", "2", "-p", "tests.lines")
    data = CoverageData(str(tmp_path / ".coverage"))
    data.read()
    ran = {Path(file).name: sorted(data.lines(file) or ()) for file in data.measured_files()}
    assert ran == {"subject.py": [1, 2, 4, 5, 7], "idle.py": [], "__init__.py": []}
    assert len(list(tmp_path.glob(".coverage*"))) == 1
