"""`qwench doctor`: check this machine. One line for each package and device, with advice where something is wrong.

Nothing is started, written or imported that could fail: packages are looked up by their metadata.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from qwench.config.command_line.parse import parse_flags
from qwench.config.sections.verbs import DoctorConfig
from qwench.models.decoder.native.compiler import COMPILERS, find_compilers

GIB = 2**30
_MIN_FREE_DISK_GIB = 50
_MIN_SHARED_MEMORY_GIB = 8
_MIN_OPEN_FILES = 8192


class State(StrEnum):
    """Severity of a finding."""

    GOOD = "ok"
    ABSENT = "--"
    """Not there, and only needed for some runs."""
    AMISS = "!!"
    """Something to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report."""

    state: State
    subject: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:<2}  {self.subject:<20}{self.found}" + (f"; {self.advice}" if self.advice else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """An optional package and the versions that Qwench was tested against."""

    name: str
    tested: tuple[str, ...]
    wanted_for: str
    install: str


PACKAGES = (
    Package(
        name="transformers",
        tested=("5.12", "5.17", "5.23"),
        wanted_for="models and tokenizers",
        install="pip install transformers",
    ),
    Package(
        name="megatron-core",
        tested=("0.16.1", "0.19.2"),
        wanted_for="--train-backend megatron",
        install='pip install "qwench[megatron]"',
    ),
    Package(name="sglang", tested=("0.5.16",), wanted_for="--rollout-engine sglang", install='pip install "qwench[sglang]"'),
    Package(name="sglang-router", tested=("0.3.2",), wanted_for="a router before engines", install="pip install sglang-router"),
    Package(name="ray", tested=("2.60",), wanted_for="more than one node", install='pip install "qwench[ray]"'),
    Package(
        name="flash-attn", tested=(), wanted_for="--attn-implementation flash_attention_2", install="pip install flash-attn"
    ),
    Package(
        name="flash_attn_3", tested=(), wanted_for="--attn-implementation flash_attention_3", install="build FlashAttention-3"
    ),
    Package(
        name="transformer-engine",
        tested=(),
        wanted_for="--transformer-impl transformer_engine",
        install='pip install "transformer-engine[pytorch]"',
    ),
    Package(name="wandb", tested=(), wanted_for="--use-wandb", install='pip install "qwench[wandb]"'),
)


def run(words: Sequence[str]) -> None:
    """Run `qwench doctor`."""
    config = parse_flags(DoctorConfig, words, prog="qwench doctor")
    sys.stdout.write(render(examine(config.output)))


def examine(folder: Path) -> list[Finding]:
    """Return all findings; `folder` is where runs would write."""
    return [
        python(),
        *gpus(),
        collectives(),
        cpp_compiler(),
        *(package(entry, installed_version) for entry in PACKAGES),
        loopback(),
        disk(folder),
        shared_memory(),
        open_files(),
        proxies(os.environ),
    ]


def render(findings: Sequence[Finding]) -> str:
    """Return the report, a line for each finding."""
    return "\n".join(map(str, findings)) + "\n"


def python() -> Finding:
    """Say which Python and PyTorch these are."""
    import torch  # seconds, for which --help does not wait

    version = torch.__version__
    old = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 11)
    found = f"{sys.version.split()[0]}, torch {version}"
    if old:
        return Finding(state=State.AMISS, subject="python", found=found, advice="Qwench needs torch 2.11 or newer")
    return Finding(state=State.GOOD, subject="python", found=found)


def gpus() -> list[Finding]:
    """Say what each GPU is, or that there is none."""
    import torch  # as in `python`

    if not torch.cuda.is_available():
        built_for = torch.version.cuda or torch.version.hip
        advice = "the driver does not answer: try nvidia-smi or rocm-smi" if built_for else "this PyTorch is built for CPUs"
        return [Finding(state=State.ABSENT, subject="GPU", found="none, runs use the CPU", advice=advice)]
    findings = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        held = free < 0.9 * total
        advice = "another process holds memory on it" if held else ""
        findings.append(Finding(state=State.AMISS if held else State.GOOD, subject=f"GPU {index}", found=found, advice=advice))
    return findings


def collectives() -> Finding:
    """Say which libraries can move tensors between ranks."""
    import torch  # as in `python`
    import torch.distributed as dist

    there = [name for name, has in (("gloo", dist.is_gloo_available()), ("NCCL", dist.is_nccl_available())) if has]
    if torch.cuda.is_available() and "NCCL" not in there:
        advice = "several GPUs need NCCL (RCCL on AMD): install a PyTorch built with it"
        return Finding(state=State.AMISS, subject="collectives", found=", ".join(there) or "none", advice=advice)
    return Finding(state=State.GOOD, subject="collectives", found=", ".join(there))


def cpp_compiler() -> Finding:
    """Say which compiler can build the kernels of engines on a CPU."""
    found = find_compilers()
    if not found:
        advice = f"for decoding on a CPU, which is slower without: install {' or '.join(COMPILERS)}"
        return Finding(state=State.ABSENT, subject="C++ compiler", found="none", advice=advice)
    return Finding(state=State.GOOD, subject="C++ compiler", found=found[0])


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package(entry: Package, version_of: Callable[[str], str | None]) -> Finding:
    """Say whether a package is there, and in a version that was tested."""
    version = version_of(entry.name)
    if version is None:
        advice = f"for {entry.wanted_for}: {entry.install}"
        return Finding(state=State.ABSENT, subject=entry.name, found="not installed", advice=advice)
    if not entry.tested or any(version == tested or version.startswith(f"{tested}.") for tested in entry.tested):
        return Finding(state=State.GOOD, subject=entry.name, found=version)
    advice = f"tested with {' and '.join(entry.tested)}; run make test if it misbehaves"
    return Finding(state=State.ABSENT, subject=entry.name, found=version, advice=advice)


def loopback() -> Finding:
    """Say whether servers can listen on this machine's own address."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
    except OSError as error:
        advice = "engines and ranks talk over 127.0.0.1; allow it in this container"
        return Finding(state=State.AMISS, subject="ports", found=f"cannot listen on 127.0.0.1 ({error})", advice=advice)
    return Finding(state=State.GOOD, subject="ports", found=f"can listen on 127.0.0.1 (got {port})")


def disk(folder: Path) -> Finding:
    """Say how much room there is for checkpoints: about 14 bytes a parameter each, with optimizer state."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free / GIB
    found = f"{free:.0f} GiB free at {there}"
    if not os.access(there, os.W_OK):
        return Finding(state=State.AMISS, subject="disk", found=found, advice="it cannot be written to; name another --output")
    if free < _MIN_FREE_DISK_GIB:
        advice = "a 4B checkpoint with optimizer state takes 56 GB; see --keep-checkpoints and --no-save-optim"
        return Finding(state=State.AMISS, subject="disk", found=found, advice=advice)
    return Finding(state=State.GOOD, subject="disk", found=found)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Say how much memory processes can share: weights of CPU engines and NCCL's buffers pass through it."""
    if not folder.is_dir():
        return Finding(state=State.ABSENT, subject="shared memory", found=f"no {folder}", advice="several processes need it")
    free = shutil.disk_usage(folder).free / GIB
    if free < _MIN_SHARED_MEMORY_GIB:
        advice = "start the container with --shm-size=16g or --ipc=host"
        return Finding(state=State.AMISS, subject="shared memory", found=f"{free:.1f} GiB free", advice=advice)
    return Finding(state=State.GOOD, subject="shared memory", found=f"{free:.0f} GiB free")


def open_files() -> Finding:
    """Say how many files and sockets a process may hold: every running request is a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    if not unlimited and soft < _MIN_OPEN_FILES:
        advice = f"raise it with ulimit -n {_MIN_OPEN_FILES}" + ("" if hard >= _MIN_OPEN_FILES else " (as root)")
        return Finding(state=State.AMISS, subject="open files", found=f"at most {soft}", advice=advice)
    return Finding(state=State.GOOD, subject="open files", found="unlimited" if unlimited else f"at most {soft}")


def proxies(environ: Mapping[str, str]) -> Finding:
    """Say whether requests to engines could be led through a proxy."""
    lowered = {name.lower(): value for name, value in environ.items() if value}
    if "http_proxy" not in lowered:
        return Finding(state=State.GOOD, subject="proxy", found="none")
    exempt = lowered.get("no_proxy", "").replace(" ", "").split(",")
    if {"127.0.0.1", "*"} & set(exempt):
        return Finding(state=State.GOOD, subject="proxy", found="set, and 127.0.0.1 is exempt")
    return Finding(
        state=State.AMISS,
        subject="proxy",
        found="http_proxy is set",
        advice="export no_proxy=127.0.0.1,localhost and all nodes",
    )
