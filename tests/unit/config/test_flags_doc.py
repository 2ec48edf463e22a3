from pathlib import Path

from qwench.config.flags_doc import render


def test_the_page_of_flags_is_what_the_dataclasses_say():
    committed = Path(__file__).parents[3] / "docs" / "flags.md"
    assert committed.read_text(encoding="ascii") == render(), "run: python -m qwench.config.flags_doc docs/flags.md"
