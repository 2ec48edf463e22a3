"""What other programs write may be no text: messages and logs replace such bytes, and nothing fails on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.engines.client import HttpEngine
from qwench.engines.fleet.servers import tail
from qwench.errors import EngineError
from qwench.observability.processes import ask_for_stacks
from qwench.threads import quota_cores

BROKEN = b"a\xffb\n"
REPLACED = "a\ufffdb"


def test_logs_and_stacks_with_other_bytes_are_shown(tmp_path: Path):
    log = tmp_path / "log"

    def send() -> None:
        log.write_bytes(BROKEN)

    assert ask_for_stacks(send, log) == REPLACED
    assert tail(log) == REPLACED


def test_an_answer_with_other_bytes_is_shown():
    engine = HttpEngine("http://h")
    with pytest.raises(EngineError, match=f"status 500.*{REPLACED}"):
        engine._read_answer("/x", 500, BROKEN)
    assert engine._read_answer("/x", 200, BROKEN) == f"{REPLACED}\n"


def test_a_control_group_of_another_encoding_has_no_quota(tmp_path: Path):
    groups = tmp_path / "cgroup"
    groups.write_bytes(b"0::/a\xff\n")
    assert quota_cores(groups, tmp_path) is None
