from pathlib import Path

from qwench.config.command_line.docs import render


def test_the_page_of_flags_is_what_the_dataclasses_say():
    committed = Path(__file__).parents[4] / "docs" / "flags.md"
    assert committed.read_text(encoding="ascii") == render(), "run: python -m qwench.config.command_line.docs docs/flags.md"
