"""Check the sizes that style promises: no file over 400 lines, no function over 60."""

import ast
import sys
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def oversized(root: Path) -> list[str]:
    """Return one line for each file or function that is too long."""
    found = []
    for path in sorted(p for folder in ("qwench", "tests", "benchmarks", "examples") for p in (root / folder).rglob("*.py")):
        text = path.read_text()
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            found.append(f"{path.relative_to(root)}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(
                        f"{path.relative_to(root)}:{node.lineno} {node.name}: {length} lines, at most {MAX_FUNCTION_LINES}"
                    )
    return found


if __name__ == "__main__":
    problems = oversized(Path(__file__).parent.parent)
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    sys.exit(bool(problems))
