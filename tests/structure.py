"""Check how the package hangs together, and print the figures.

No two packages import each other, no modules import each other in a circle, and no import hides from readers, mypy and
import-linter in `import_module("qwench...")`. The layers themselves are import-linter's (pyproject.toml).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PACKAGE = "qwench"
Arrows = Mapping[str, set[str]]


def circles(arrows: Arrows) -> list[list[str]]:
    """Return the groups of nodes that reach each other, each group sorted: a -> b -> c -> b gives [[b, c]]."""
    reached = {node: _reach(node, arrows) for node in arrows}
    groups = {tuple(sorted(other for other in reached[node] if node in reached[other])) for node in arrows}
    return sorted(list(group) for group in groups if group)


def two_way_pairs(arrows: Arrows) -> list[tuple[str, str]]:
    """Return the pairs of top-level packages and modules that import each other."""
    tops = {(_top(a), _top(b)) for a, others in arrows.items() for b in others if _top(a) != _top(b)}
    return sorted((a, b) for a, b in tops if a < b and (b, a) in tops)


def hidden_imports(text: str) -> list[int]:
    """Return the lines of a source that import a module of the package by its name in a string."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.args]
    return [call.lineno for call in calls if _called(call) in ("import_module", "__import__") and _names_package(call.args[0])]


def _reach(start: str, arrows: Arrows) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = arrows.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def _top(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _names_package(argument: ast.expr) -> bool:
    return isinstance(argument, ast.Constant) and str(argument.value).split(".")[0] == PACKAGE


def _sources() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def main() -> int:
    """Print the figures and what is wrong; return the exit code."""
    graph = grimp.build_graph(PACKAGE)
    arrows = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    sources = list(_sources())
    hidden = [f"{path}:{line} hides an import" for path, text in sources for line in hidden_imports(text)]
    in_circles = [f"import circle: {', '.join(group)}" for group in circles(arrows)]
    pairs = [f"two-way packages: {a}, {b}" for a, b in two_way_pairs(arrows)]
    figures = {
        "files": len(sources),
        "lines": sum(text.count("\n") for _, text in sources),
        "two-way package pairs": len(pairs),
        "import circles": len(in_circles),
        "hidden imports": len(hidden),
    }
    problems = hidden + pairs + in_circles
    sys.stdout.write("  ".join(f"{name}: {value}" for name, value in figures.items()) + "\n")
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
