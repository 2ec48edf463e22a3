"""Fill the disk that a run writes to, and make it read-only: `python -m tests.campaigns.disks`, with the right to mount.

A full disk ends the run with one line that names folder and sizes; the same command goes on once there is room. A run whose
disk is read-only does not start. Nothing half-written stays.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwench.files import TEMPORARY_SUFFIX
from tests import warm_start
from tests.campaigns.runs import Driver, make_workspace, remove, scratch_folder
from tests.e2e.conftest import DIGITS, Workspace

PLENTY = "200m"
PAGE = 4096
LIMIT_BYTES = 2 * PAGE
SIZES = re.compile(r"\d[\d.,]* (?:[KMGT]i?B|bytes)")

Argv = Callable[[Workspace, Path, Path], list[str]]


@dataclass(frozen=True)
class Output:
    """One place that a command writes to.

    Attributes:
        argv: the command, of the inputs, the disk and a folder that has room.
        named: what the message must name.
        share: of the bytes that the command needs, how many the disk has.
        least: bytes that the disk has at least.
    """

    argv: Argv
    named: str
    share: float = 0.6
    least: int = 2 * PAGE


def _train(**flags: object) -> Argv:
    """Return a run that saves where there is room; `{disk}` in a flag is the disk."""

    def argv(workspace: Workspace, disk: Path, spare: Path) -> list[str]:
        placed = {}
        for name, value in flags.items():
            placed[name] = value.replace("{disk}", str(disk)) if isinstance(value, str) else value
        save = placed.pop("save", str(spare / "run"))
        return workspace.train_argv(None if save is None else Path(str(save)), **{**DIGITS, "num_rollout": 2, **placed})

    return argv


OUTPUTS: dict[str, Output] = {
    "save": Output(_train(save="{disk}/run", log_dir=None), "--save "),
    "save, one checkpoint kept": Output(_train(save="{disk}/run", keep_checkpoints=1, num_rollout=3), "--save ", share=0.5),
    "save-hf": Output(_train(save_hf="{disk}/hf/{rollout_id}"), "--save-hf "),
    "log-dir": Output(_train(log_dir="{disk}/log"), "--log-dir "),
    "tensorboard": Output(_train(use_tensorboard=(), tensorboard_dir="{disk}/tb"), "--tensorboard-dir "),
    "dump": Output(_train(save_debug_rollout_data="{disk}/dump/{rollout_id}.jsonl"), "--save-debug-rollout-data "),
    "details": Output(_train(dump_details="{disk}/details"), "--save-debug-rollout-data {disk}/details"),
    "engine logs": Output(
        _train(log_dir="{disk}/log", rollout_num_gpus=1, colocate=None, save=None, save_interval=None), "--log-dir "
    ),
    "eval": Output(lambda inputs, disk, spare: inputs.eval_argv(inputs.model, disk / "results"), "--eval-output "),
    "weights by disk": Output(
        _train(
            rollout_num_gpus=1,
            colocate=None,
            deterministic_mode=None,
            update_weight_transport="disk",
            update_weight_disk_dir="{disk}/weights",
            update_weight_disk_keep_files=(),
        ),
        "--update-weight-disk-dir ",
    ),
    "convert": Output(
        lambda inputs, disk, spare: ["convert", "--input", str(inputs.model), "--output", str(disk / "made"), "--to", "fsdp"],
        "made",
    ),
    "make-model": Output(lambda inputs, disk, spare: ["make-model", "--size", "tiny", "--output", str(disk / "made")], "made"),
    "sft": Output(lambda inputs, disk, spare: inputs.sft_argv(disk / "run", num_rollout=2, save_interval=1), "--save "),
}


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """Mount a small disk in memory."""
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={PLENTY}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(*words: str) -> None:
    """Call mount(8)."""
    subprocess.run(["mount", *words], check=True)


def can_mount() -> bool:
    """Tell whether this process may mount."""
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if tried.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return tried.returncode == 0


def limit_files() -> None:
    """Let this process write no large file, which fails as on a full disk and needs no right to mount."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))


def try_limited(name: str, workspace: Workspace, folder: Path) -> list[str]:
    """Run a command that may write no large file, and again without the limit; return what is wrong."""
    case, log = OUTPUTS[name], folder / "log.txt"
    faults = _faults_of_end(case, folder, *_run(case, workspace, folder, folder / "spare", log, prepare=limit_files))
    code, said = _run(case, workspace, folder, folder / "spare", log)
    if code != 0:
        faults.append(f"without the limit it ended with {code}: {said[-1500:]}")
    return faults + [f"left {path}" for path in folder.rglob("*" + TEMPORARY_SUFFIX)]


def used(place: Path) -> int:
    """Return how many bytes of a disk are taken."""
    facts = os.statvfs(place)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def try_output(name: str, workspace: Workspace, folder: Path, *, read_only: bool = False) -> list[str]:
    """Run a command with room, without, and with room again; return what is wrong."""
    case = OUTPUTS[name]
    log = folder / "log.txt"
    with disk(folder / "disk") as place:
        if read_only:
            mount("-o", "remount,ro", str(place))
            faults = _faults_of_end(case, place, *_run(case, workspace, place, folder / "spare", log), read_only=True)
            return [f"{name}, read-only: {fault}" for fault in faults]
        code, said = _run(case, workspace, place, folder / "first", log)
        if code != 0:
            return [f"{name}: with room it ended with {code}: {said[-1500:]}"]
        needed = used(place)
        for path in place.iterdir():
            remove(path)
        size = max(int(needed * case.share), case.least)
        mount("-o", f"remount,size={size}", str(place))
        faults = _faults_of_end(case, place, *_run(case, workspace, place, folder / "spare", log), read_only=False)
        mount("-o", f"remount,size={PLENTY}", str(place))
        code, said = _run(case, workspace, place, folder / "spare", log)
        if code != 0:
            faults.append(f"with room again it ended with {code}: {said[-1500:]}")
        if left := [str(path.relative_to(place)) for path in place.rglob("*" + TEMPORARY_SUFFIX)]:
            faults.append(f"left {left}")
    return [f"{name} ({size} of {needed} bytes): {fault}" for fault in faults]


def _run(
    case: Output,
    workspace: Workspace,
    place: Path,
    spare: Path,
    log: Path,
    *,
    prepare: Callable[[], None] | None = None,
) -> tuple[int | None, str]:
    log.unlink(missing_ok=True)
    driver = Driver(case.argv(workspace, place, spare), log=log, prepare=prepare)
    try:
        code = driver.wait()
    finally:
        driver.kill()
    return code, log.read_text(errors="replace")


def _faults_of_end(case: Output, place: Path, code: int | None, said: str, *, read_only: bool = False) -> list[str]:
    """Return what is wrong with the end of a command whose disk is full or read-only."""
    faults = []
    if code not in {1, 2}:
        faults.append(f"exit code {code}")
    last = said.rstrip().splitlines()[-1] if said.strip() else ""
    if "Traceback" in said or not last.startswith("qwench: "):
        faults.append(f"more than a line: {said[-1500:]}")
    if case.named.replace("{disk}", str(place)) not in last:
        faults.append(f"does not name {case.named!r}: {last}")
    if not read_only and not SIZES.search(last):
        faults.append(f"does not name sizes: {last}")
    print(f"    rc {code}: {last}", flush=True)
    return faults


def main() -> None:
    """Try each output on a full and on a read-only disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=list(OUTPUTS))
    parser.add_argument("--only", choices=("full", "read-only"))
    given = parser.parse_args()
    warm_start.install()
    folder = scratch_folder()
    workspace = make_workspace(folder)
    faults = []
    for name in given.names:
        for read_only in (False, True):
            if given.only is not None and (given.only == "read-only") != read_only:
                continue
            print(name, "read-only" if read_only else "full", flush=True)
            place = folder / f"{name} {read_only}".replace(" ", "-").replace(",", "")
            place.mkdir()
            found = try_output(name, workspace, place, read_only=read_only)
            print(*found, sep="\n", flush=True)
            faults += found
    remove(folder)
    print(f"{len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
