"""What processes of tests are forked from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import warm_start
from tests.deadlines import patient
from tests.forked import call_apart


@pytest.mark.skipif(not warm_start.WARM.are_wanted, reason="this system execs the processes")
def test_processes_are_forked_from_one_that_has_no_second_thread(tmp_path: Path) -> None:
    assert call_apart(tmp_path, os.getppid, timeout_s=patient(60)) == os.getpid()
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    servers = [pid for pid in children if b"tests.warm_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in servers] == [1]
