import os
import resource
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from qwench.commands import doctor
from qwench.commands.doctor import Finding, Package, State, package, proxies, shared_memory

GIB = 2**30
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


PACKAGES = [
    "transformers", "megatron-core", "sglang", "sglang-router", "ray", "flash-attn", "flash_attn_3", "transformer-engine",
    "wandb",
]  # fmt: skip


def test_every_part_is_reported_in_one_line(tmp_path, capsys):
    doctor.run(["--output", str(tmp_path)])
    report = capsys.readouterr().out.splitlines()
    assert any(f"GiB free at {tmp_path}" in line for line in report)
    subjects = [line[4:24].rstrip() for line in report]
    assert subjects[0] == "python"
    assert subjects[1].startswith("GPU")
    rest = ["collectives", "C++ compiler", *PACKAGES, "ports", "disk", "shared memory", "open files", "proxy"]
    assert [subject for subject in subjects[1:] if not subject.startswith("GPU")] == rest
    assert {line[:2] for line in report} <= {"ok", "--", "!!"}
    assert next(line for line in report if "ports" in line).startswith("ok  ports               can listen on 127.0.0.1 (got ")


def test_a_package_of_any_version_is_well_where_none_was_tested():
    untested = Package(name="ray", tested=(), wanted_for="", install="")
    assert str(package(untested, lambda name: "9")) == "ok  ray                 9"
    assert doctor.installed_version("pytest") == pytest.__version__ and doctor.installed_version("no-such-package") is None


PROXY = "!!  proxy               http_proxy is set; export no_proxy=127.0.0.1,localhost and all nodes"
EXEMPT = "ok  proxy               set, and 127.0.0.1 is exempt"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "ok  proxy               none"),
        ({"http_proxy": ""}, "ok  proxy               none"),
        ({"HTTP_PROXY": "http://proxy:3128"}, PROXY),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "example.org"}, PROXY),
        ({"http_proxy": "http://proxy:3128", "NO_PROXY": "localhost, 127.0.0.1"}, EXEMPT),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "*"}, EXEMPT),
    ],
)
def test_a_proxy_must_not_stand_before_engines(environ, said):
    assert str(proxies(environ)) == said


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.10.0", State.AMISS), ("1.13.1+cu117", State.AMISS), ("2.11.0+cpu", State.GOOD), ("3.0", State.GOOD)],
)
def test_torch_is_compared_by_its_numbers(monkeypatch, version, state):
    monkeypatch.setattr(torch, "__version__", version)
    finding = doctor.python()
    assert (finding.state, finding.subject) == (state, "python")
    assert finding.found.endswith(f", torch {version}") and bool(finding.advice) == (state is State.AMISS)


@pytest.mark.parametrize(
    ("cuda", "hip", "advice"),
    [
        (None, None, "this PyTorch is built for CPUs"),
        ("13.0", None, "the driver does not answer: try nvidia-smi or rocm-smi"),
        (None, "7.0", "the driver does not answer: try nvidia-smi or rocm-smi"),
    ],
)
def test_without_a_gpu_the_build_decides_the_advice(monkeypatch, cuda, hip, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert [str(one) for one in doctor.gpus()] == [f"--  GPU                 none, runs use the CPU; {advice}"]


def test_a_gpu_is_free_from_nine_tenths_of_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"H{index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (90 * GIB - index, 100 * GIB))
    assert [str(one) for one in doctor.gpus()] == [
        "ok  GPU 0               H0, 90 of 100 GiB free",
        "!!  GPU 1               H1, 90 of 100 GiB free; another process holds memory on it",
    ]


@pytest.mark.parametrize(
    ("gpus", "gloo", "nccl", "line"),
    [
        (False, True, False, "ok  collectives         gloo"),
        (True, True, True, "ok  collectives         gloo, NCCL"),
        (
            True,
            True,
            False,
            "!!  collectives         gloo; several GPUs need NCCL (RCCL on AMD): install a PyTorch built with it",
        ),
        (
            True,
            False,
            False,
            "!!  collectives         none; several GPUs need NCCL (RCCL on AMD): install a PyTorch built with it",
        ),
    ],
)
def test_gpus_need_nccl(monkeypatch, gpus, gloo, nccl, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(dist, "is_gloo_available", lambda: gloo)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    assert str(doctor.collectives()) == line


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ((8192, 8192), "ok  open files          at most 8192"),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok  open files          unlimited"),
        ((8191, 8192), "!!  open files          at most 8191; raise it with ulimit -n 8192"),
        ((1024, 4096), "!!  open files          at most 1024; raise it with ulimit -n 8192 (as root)"),
    ],
)
def test_open_files_are_compared_with_what_a_run_may_need(monkeypatch, limits, line):
    monkeypatch.setattr(resource, "getrlimit", {resource.RLIMIT_NOFILE: limits}.__getitem__)
    assert str(doctor.open_files()) == line


@pytest.mark.parametrize(
    ("examined", "enough_gib", "subject"), [(doctor.disk, 50, "disk"), (doctor.shared_memory, 8, "shared memory")]
)
def test_room_is_enough_from_its_bound_on(monkeypatch, tmp_path, examined, enough_gib, subject):
    def found(free: int) -> Finding:
        monkeypatch.setattr(shutil, "disk_usage", {tmp_path.resolve(): SimpleNamespace(free=free)}.__getitem__)
        return examined(tmp_path.resolve())

    enough, short = found(enough_gib * GIB), found(enough_gib * GIB - 1)
    assert (enough.state, enough.subject, enough.advice) == (State.GOOD, subject, "")
    assert enough.found.startswith(f"{enough_gib} GiB free")
    assert (short.state, short.subject) == (State.AMISS, subject) and short.advice


def test_a_compiler_is_named_or_asked_for(monkeypatch):
    monkeypatch.setattr(doctor, "find_compilers", lambda: ["/usr/bin/clang++"])
    assert str(doctor.cpp_compiler()) == "ok  C++ compiler        /usr/bin/clang++"
    monkeypatch.setattr(doctor, "find_compilers", list)
    assert (doctor.cpp_compiler().state, doctor.cpp_compiler().found) == (State.ABSENT, "none")


def test_disk_is_looked_for_where_the_folder_would_be_made(tmp_path):
    assert str(tmp_path) in doctor.disk(tmp_path / "not" / "yet").found


def test_a_folder_that_cannot_be_written_to_is_amiss_whatever_its_room(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    finding = doctor.disk(tmp_path)
    assert (finding.state, finding.subject) == (State.AMISS, "disk")
    assert finding.advice == "it cannot be written to; name another --output"


def test_a_machine_without_shared_memory_is_told_so(tmp_path):
    said = f"--  shared memory       no {tmp_path / 'shm'}; several processes need it"
    assert str(shared_memory(tmp_path / "shm")) == said


def test_a_sandbox_without_sockets_is_amiss(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError("not permitted")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert str(doctor.loopback()) == (
        "!!  ports               cannot listen on 127.0.0.1 (not permitted); "
        "engines and ranks talk over 127.0.0.1; allow it in this container"
    )


def test_advice_follows_what_was_found():
    line = str(Finding(state=State.AMISS, subject="disk", found="1 GiB free", advice="make room"))
    assert line == "!!  disk                1 GiB free; make room"
