"""What `make setup` and `make quickstart` install and say, read from what make would run."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = {"ray", "megatron-core", "sglang", "sglang-router", "mypy", "hypothesis", "pytest", "ruff", "vulture", "peft", "wandb"}


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """Return a clone without a virtual environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def plan(folder: Path, target: str) -> list[str]:
    """Return what make would run for a target."""
    done = subprocess.run(["make", "-n", target], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def pinned() -> dict[str, str]:
    rows = [line.split("==") for line in (ROOT / "constraints.txt").read_text().split()]
    return {canonicalize_name(name): version for name, version in rows}


def needed(names: list[str]) -> set[str]:
    """Return the packages that come with these ones, by what the installed ones require."""
    found, rest = set[str](), [Requirement(name) for name in names]
    while rest:
        one = rest.pop()
        name = canonicalize_name(one.name)
        if name in found or not (one.marker is None or one.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            rest += [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
    return found


def test_setup_says_each_stage_and_the_next_command(fresh: Path) -> None:
    said = [line.partition("echo ")[2].strip('"') for line in plan(fresh, "setup") if line.startswith("echo ")]
    assert said == [
        "== a virtual environment in .venv", "== PyTorch", "== the other packages", "ready. next: source .venv/bin/activate",
    ]  # fmt: skip


def test_setup_installs_what_runs_need_and_no_tools(fresh: Path) -> None:
    installs = [line.split(" install ")[1] for line in plan(fresh, "setup") if " install " in line]
    assert len(installs) == 2 and all("-c constraints.txt" in words and "-q" not in words.split() for words in installs)
    assert '"torch==' in installs[0]
    assert installs[1].split()[-2:] == ["-e", "."], "no extra"
    packages = needed(PROJECT["dependencies"])
    assert packages.isdisjoint(TOOLS) and {"torch", "transformers", "fastapi"} <= packages
    own = {canonicalize_name(Requirement(one).name) for one in PROJECT["dependencies"]}
    assert own <= pinned().keys(), "every package has one version for all"


def test_the_tools_come_with_dev_alone(fresh: Path) -> None:
    last = [line for line in plan(fresh, "dev") if " install " in line][-1]
    assert last.endswith('-e ".[dev]"')
    extra = {canonicalize_name(Requirement(one).name) for one in PROJECT["optional-dependencies"]["dev"]}
    assert {"pytest", "mypy", "ruff", "hypothesis", "ray", "megatron-core", "sglang-router"} <= extra


def test_quickstart_says_what_it_costs_before_it_installs_and_installs_once(fresh: Path) -> None:
    first, *rest = plan(fresh, "quickstart")
    assert re.search(r"GB.*then a model is trained \(about \d+ minutes", first)
    assert sum(" install " in line for line in rest) == 2 and rest[-1] == ".venv/bin/qwench quickstart"
    for mark in (".runs", ".ready"):
        shutil.rmtree(fresh / ".venv", ignore_errors=True)
        (fresh / ".venv").mkdir()
        (fresh / ".venv" / mark).touch()
        assert [line for line in plan(fresh, "quickstart") if not line.startswith("echo")] == [".venv/bin/qwench quickstart"]
