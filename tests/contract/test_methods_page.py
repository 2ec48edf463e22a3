from pathlib import Path

from qwench.estimators import METHODS
from tests.methods_page import render

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_of_methods_is_the_one_that_is_generated():
    assert PAGE.read_text(encoding="ascii") == render(), "run: python -m tests.methods_page docs/methods.md"


def test_every_method_names_its_source():
    rows = {line.split("`")[1]: line for line in render().splitlines() if line.startswith("| `")}
    assert rows.keys() == METHODS.keys()
    assert all("arXiv" in row for name, row in rows.items() if name != "sft")
    assert "arXiv 2511.20347" in rows["sapo"]
    assert "`--sapo-tau-pos` `--sapo-tau-neg`" in rows["sapo"]


def test_every_method_has_a_formula_and_worked_values():
    sections = dict(part.split("\n\n", 1) for part in render().split("\n## ")[1:])
    assert sections.keys() == METHODS.keys()
    for name, text in sections.items():
        formula, *worked = text.removeprefix("```text\n").split("\n\n")
        assert "=" in formula, name
        assert any(character.isdigit() for character in "".join(worked)), name
