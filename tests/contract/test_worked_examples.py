"""The worked examples of docs/architecture.md do what they say: applied to a copy of the package, their checks pass."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadlines import patient

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^### (An?.*?)\n(.*?)(?=^##)", PAGE, flags=re.DOTALL | re.MULTILINE))
"""Title -> text."""


def _blocks(text: str, kind: str) -> list[tuple[str, str]]:
    """Return the file that each fenced block of a kind names, and its content."""
    return re.findall(rf"^```{kind} file=(\S+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def _patch(source: str, hunk: str) -> str:
    """Replace the lines marked ' ' and '-' by those marked ' ' and '+'."""
    lines = hunk.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    assert source.count(old) == 1, f"these lines stand in the file {source.count(old)} times:\n{old}"
    return source.replace(old, new)


def test_the_page_shows_how_to_add_each_part():
    assert list(EXAMPLES) == ["A method", "A reward", "An engine kind", "A flag"]


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_works(title: str, tmp_path: Path):
    text = EXAMPLES[title]
    shutil.copytree(ROOT / "qwench", tmp_path / "qwench", ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in _blocks(text, "python"):
        assert not (tmp_path / name).exists(), f"{name} is there already"
        (tmp_path / name).write_text(content, encoding="utf-8")
    for name, content in _blocks(text, "diff"):
        for hunk in content.split("@@\n"):
            (tmp_path / name).write_text(_patch((tmp_path / name).read_text(encoding="utf-8"), hunk), encoding="utf-8")
    (check,) = re.findall(r"^```python check\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    command = [sys.executable, "-c", f"import qwench; assert qwench.__file__.startswith({str(tmp_path)!r})\n{check}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 0, done.stderr
