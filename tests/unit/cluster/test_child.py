"""What is told of a child process, and its log."""

from __future__ import annotations

from pathlib import Path

from qwench.cluster import child


def test_the_end_of_a_process_is_told_by_its_code_or_its_signal():
    assert [child.describe_end(code) for code in (0, 3, -15, -9)] == [
        "ended with exit code 0", "ended with exit code 3", "was ended by SIGTERM",
        "was ended by SIGKILL (the kernel does that when memory runs out)",
    ]  # fmt: skip


def test_a_line_of_a_log_that_cannot_be_written_is_lost_alone(tmp_path):
    child._append(tmp_path / "log", "a\n")
    child._append(tmp_path / "log", "\ud800b\n")
    child._append(Path("/dev/full"), "c\n")
    child._append(tmp_path / "no folder/log", "d\n")
    assert (tmp_path / "log").read_text() == "a\n?b\n"
