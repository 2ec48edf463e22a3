"""Every command that the documentation shows is one that the parser, or the script, accepts."""

import ast
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qwench.cli import VERBS
from qwench.config.command_line.parse import parse_flags, parse_run
from qwench.config.sections.convert import ConvertConfig
from qwench.config.sections.verbs import (
    DoctorConfig,
    DownloadConfig,
    MakeModelConfig,
    RewardCheckConfig,
    split_file,
    split_names,
)
from tests.contract.test_scripts import SCRIPTS, expand, stage, world
from tests.deadlines import patient

__all__ = ["stage", "world"]  # fixtures

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


def commands(page: Path) -> list[str]:
    """Return the lines of the page's shell blocks, continued ones joined, with the folders of the recipes filled in."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    starts = ("qwench ", "bash ", "python ", "ray ", "pip ", "make ", "torchrun ", "NUM_GPUS=")
    return [line.split("  #")[0].strip() for line in lines if line.startswith(starts)]


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


def test_the_pages_show_commands():
    shown = {page.name for page, _ in COMMANDS}
    assert {"README.md", "qwen3.md", "low_precision.md", "clusters.md", "training_backends.md"} <= shown


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page.stem}-{command[:40]}" for page, command in COMMANDS])
def test_a_command_of_the_documentation_is_accepted(page: Path, command: str, stage: Path, world: dict[str, str]):
    for name, folder in world.items():
        command = command.replace(f"${name}", folder)
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "ray":  # ray job submit -- COMMAND
        words = words[words.index("--") + 1 :]
    assert CHECKS[words[0]](words[1:], stage, world) == words[1:2]


def test_every_flag_of_a_benchmark_says_what_it_is():
    for script in (ROOT / "benchmarks").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        flags = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
        assert [ast.unparse(call) for call in flags if "help" not in {keyword.arg for keyword in call.keywords}] == [], script


def _qwench(words: Sequence[str], stage: Path, world: dict[str, str]) -> Sequence[str]:
    """Return the verb whose flags these are."""
    verb, *rest = words
    assert verb in VERBS, f"there is no verb {verb}"
    if verb in ("train", "sft"):
        models = {"--hf-checkpoint": f"{world['MODEL_DIR']}/Qwen3-0.6B"}
        data = {"--prompt-data": f"{world['DATA_DIR']}/dapo-math-17k/dapo-math-17k.jsonl"}
        parse_run(verb, [*rest, *(word for pair in (models | data).items() for word in pair)])
        return [verb]
    if verb == "reward":
        assert rest[0] == "check"
        _, rest = split_file(rest[1:])
    if verb == "download":
        names, rest = split_names(rest)
        assert names
    parse_flags(CONFIGS[verb], rest, prog=f"qwench {verb}")
    return [verb]


def _bash(words: Sequence[str], stage: Path, world: dict[str, str]) -> Sequence[str]:
    """Return the script whose verb and flags these are."""
    named = words[0]
    if words[0] == RECIPE_BENCHMARK:
        _, _, script, *more = words
        words = [str(SCRIPTS.relative_to(ROOT) / script), *more]
    verb, *expanded = expand(ROOT / words[0], stage, *words[1:], **world)
    assert (ROOT / words[0]).is_relative_to(SCRIPTS)
    config = parse_run(verb, expanded)
    assert (config.algorithm.loss_type == "sft_loss") is (verb == "sft")
    return [named]


def _python(words: Sequence[str], stage: Path, world: dict[str, str]) -> Sequence[str]:
    """Return the file, or -m of the module, that is run."""
    file = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    assert (ROOT / file).is_file(), f"there is no {file}"
    return words[:1]


def _make(words: Sequence[str], stage: Path, world: dict[str, str]) -> Sequence[str]:
    """Return the target that the Makefile has."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 0, done.stderr
    return words[:1]


def _pip(words: Sequence[str], stage: Path, world: dict[str, str]) -> Sequence[str]:
    """Return pip's verb."""
    extras = re.fullmatch(r"(?:qwench|\.)\[([a-z,]+)\]", words[-1])
    assert extras is not None
    declared = re.findall(r"^(\w+) = \[\"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(extras[1].split(",")) <= set(declared)
    return words[:1]


RECIPE_BENCHMARK = "benchmarks/multi_gpu/recipe.sh"
"""Takes a size, a script and flags, which it adds to the script's."""
CONFIGS: dict[str, type] = {
    "reward": RewardCheckConfig,
    "download": DownloadConfig,
    "doctor": DoctorConfig,
    "make-model": MakeModelConfig,
    "convert": ConvertConfig,
}
"""Verb -> its flags; another verb on a page is added here."""
CHECKS: dict[str, Callable[[Sequence[str], Path, dict[str, str]], Sequence[str]]] = {
    "qwench": _qwench,
    "bash": _bash,
    "python": _python,
    "make": _make,
    "pip": _pip,
}
