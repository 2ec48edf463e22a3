import runpy
import sys
from pathlib import Path

from qwench.config.command_line.docs import render


def test_the_page_of_flags_is_what_the_dataclasses_say():
    committed = Path(__file__).parents[4] / "docs" / "flags.md"
    assert committed.read_text(encoding="ascii") == render(), "run: python -m qwench.config.command_line.docs docs/flags.md"


def test_the_named_command_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["docs", str(tmp_path / "flags.md")])
    monkeypatch.delitem(sys.modules, "qwench.config.command_line.docs")
    runpy.run_module("qwench.config.command_line.docs", run_name="__main__")
    assert (tmp_path / "flags.md").read_text(encoding="ascii") == render()
