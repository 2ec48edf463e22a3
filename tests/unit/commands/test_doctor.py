import socket

import pytest

from qwench.commands import doctor
from qwench.commands.doctor import Finding, Package, State, examine, package, proxies, render, shared_memory

RAY = Package(name="ray", tested=("2.60", "2.6.1"), wanted_for="more than one node", install="pip install ray")


@pytest.mark.parametrize(
    ("version", "state", "line"),
    [
        ("2.60.0", State.GOOD, "ok  ray                 2.60.0"),
        ("2.6.1", State.GOOD, "ok  ray                 2.6.1"),
        ("2.6.10", State.ABSENT, "--  ray                 2.6.10; tested with 2.60 and 2.6.1; run make test if it misbehaves"),
        (None, State.ABSENT, "--  ray                 not installed; for more than one node: pip install ray"),
    ],
)
def test_a_package_is_compared_with_the_versions_that_were_tested(version, state, line):
    finding = package(RAY, lambda name: {"ray": version}[name])
    assert finding.state is state
    assert str(finding) == line


def test_every_part_is_reported_in_one_line(tmp_path):
    report = render(examine(tmp_path)).splitlines()
    subjects = [line[4:24].rstrip() for line in report]
    assert subjects[0] == "python"
    assert subjects[1].startswith("GPU")
    assert set(subjects) >= {entry.name for entry in doctor.PACKAGES} | {
        "collectives",
        "ports",
        "disk",
        "shared memory",
        "proxy",
    }
    assert {line[:2] for line in report} <= {"ok", "--", "!!"}


@pytest.mark.parametrize(
    ("environ", "state"),
    [
        ({}, State.GOOD),
        ({"http_proxy": ""}, State.GOOD),
        ({"HTTP_PROXY": "http://proxy:3128"}, State.AMISS),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "example.org"}, State.AMISS),
        ({"http_proxy": "http://proxy:3128", "NO_PROXY": "localhost, 127.0.0.1"}, State.GOOD),
    ],
)
def test_a_proxy_must_not_stand_before_engines(environ, state):
    assert proxies(environ).state is state


def test_disk_is_looked_for_where_the_folder_would_be_made(tmp_path):
    assert str(tmp_path) in doctor.disk(tmp_path / "not" / "yet").found


def test_a_machine_without_shared_memory_is_told_so(tmp_path):
    assert shared_memory(tmp_path / "shm").state is State.ABSENT


def test_a_sandbox_without_sockets_is_amiss(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError("not permitted")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert doctor.loopback().state is State.AMISS


def test_advice_follows_what_was_found():
    line = str(Finding(state=State.AMISS, subject="disk", found="1 GiB free", advice="make room"))
    assert line == "!!  disk                1 GiB free; make room"
