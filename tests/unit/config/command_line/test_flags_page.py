import runpy
import sys
from pathlib import Path

from qwench.config.command_line.flags_page import render


def test_the_page_of_flags_is_what_the_dataclasses_say():
    committed = Path(__file__).parents[4] / "docs" / "flags.md"
    assert committed.read_text(encoding="ascii") == render(), "python -m qwench.config.command_line.flags_page docs/flags.md"


def test_the_named_command_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["docs", str(tmp_path / "flags.md")])
    monkeypatch.delitem(sys.modules, "qwench.config.command_line.flags_page")
    runpy.run_module("qwench.config.command_line.flags_page", run_name="__main__")
    assert (tmp_path / "flags.md").read_text(encoding="ascii") == render()
