"""What is true of the source of every module: its numbers are those of docs/waits.md and docs/limits.md, and house rules."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.timeouts import TimeoutConfig

ROOT = Path(__file__).parents[2]
SOURCES = {path.relative_to(ROOT / "qwench"): path.read_text("utf-8") for path in sorted((ROOT / "qwench").rglob("*.py"))}
WAITS = r"_?[A-Z]\w*_S|_?(?:MAX_|CONNECT_)?ATTEMPTS|MAX_STARTS"
LIMITS = r"_?(?:MAX|MOST)_(?!ATTEMPTS|STARTS)\w*(?<!_S)"
KEYWORD = r"\b(?:timeout\w*|\w+_s)=[\d.]*[1-9][\d.]*(?=[,)])"
IN_A_CALL = re.compile(KEYWORD + r"|\b(?:sleep|join|wait|wait_for|poll|alarm)\([^()]*\b[\d.]*[1-9]\d*\)")
OF_A_SIGNATURE = re.compile(r"(?:^ +|[(,]\s*)\w*(?:timeout|_s): (?:float|int)(?: \| None)? ?= ?\d", re.MULTILINE)
SECONDS_OF = {"s": 1, "min": 60, "h": 3600}


def rows(page: str, *, width: int) -> Iterator[list[str]]:
    """Return the cells of the page's rows with so many columns."""
    for line in (ROOT / "docs" / page).read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == width and "`" in line and all(cells):
            yield cells


def numbers(names: str) -> dict[str, float]:
    """Return the constants of such names in all modules."""
    constant = re.compile(rf"^({names}) = (\d[\d._e */+<>-]*)(?:  #.*)?$", re.MULTILINE)
    return {
        ".".join([*path.with_suffix("").parts, name]): float(eval(value))  # digits and operators
        for path, source in SOURCES.items()
        for name, value in constant.findall(source)
    }


@pytest.mark.parametrize(("page", "names"), [("waits.md", WAITS), ("limits.md", LIMITS)])
def test_the_page_lists_every_fixed_number_of_its_kind(page, names):
    cells = [row for width in (3, 4) for row in rows(page, width=width) if "`--" not in row[1]]
    assert {row[-1].strip("`"): float(row[1]) for row in cells} == numbers(names)


def test_the_page_lists_every_deadline_that_a_flag_sets():
    shown = {flag.strip("`"): default for _, flag, default in rows("waits.md", width=3) if "`--" in flag}
    sections: tuple[type, ...] = (TimeoutConfig, EngineConfig, RewardConfig)
    defaults: Mapping[str, object] = {
        "--" + one.name.replace("_", "-"): one.default
        for section in sections
        for one in fields(section)
        if "timeout" in one.name
    }
    assert shown.keys() == defaults.keys()
    for flag, default in shown.items():
        number, _, unit = default.partition(" ")
        seconds = None if number == "none" else float(number) * SECONDS_OF[unit]
        given = defaults[flag]
        assert seconds == (60 * given if isinstance(given, float) and flag.endswith("-minutes") else given), flag


def test_seconds_have_a_name_that_the_page_can_tell():
    nameless = {f"{path}: {found[0]}" for path, source in SOURCES.items() for found in IN_A_CALL.finditer(source)}
    assert nameless == set()
    in_signatures = {path for path, source in SOURCES.items() if OF_A_SIGNATURE.search(source)}
    theirs = {Path("foreign/session.py")}  # slime's functions and their defaults
    assert {path for path in in_signatures if path.parts[:2] != ("config", "sections")} == theirs


def calls(name: str) -> dict[str, list[str]]:
    """Return the arguments of every call of a function, as they are written, by module."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, source in SOURCES.items():
        for match in re.finditer(rf"\b{name}\(", source):
            depth, end = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(source[end], 0)
                end += 1
            found[str(path)].append(source[match.end() : end - 1])
    return found


def test_lists_that_go_together_are_of_one_length():
    loose = {path for path, found in calls("zip").items() if any("strict=True" not in one for one in found)}
    assert loose == {"rewards/gpqa.py"}, "letters may be more than the texts of a row"


@pytest.mark.parametrize("name", ["read_text", "write_text"])
def test_text_files_have_one_encoding_on_every_machine(name):
    assert [one for found in calls(name).values() for one in found if "encoding=" not in one] == []


def test_the_architecture_names_every_thread():
    """Its tables of who runs where begin each row with the name that a debugger shows."""
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    tables = page[page.index("## Who runs where") : page.index("## Contracts")]
    shown = {
        name
        for row in re.findall(r"^\| (.*?) \|", tables, re.MULTILINE)
        for name in re.findall(r"`([a-z][a-z -]*)(?: \.\.\.)?`", row)
    }
    named = re.compile(r"""(?:\bdaemon\(|EventLoopThread\(|\bname: str ?= ?|thread_name_prefix=|threads=)f?["']([a-z -]+)""")
    found = {name.strip() for source in SOURCES.values() for name in named.findall(source)}
    assert shown == found - {"qwench"}, "qwench is the name of an experiment"
