r"""Turn LaTeX maths into the plain expression that sympy reads: `\frac{\sqrt{3}}{x+1}` -> ` sqrt(3)/(x+1)`."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[{}]|[^\\{}]", re.DOTALL)
_MAX_DEPTH = 40  # braces within braces; answers have a few, and Python's stack has an end
_WORDS = {
    "pi": "pi",
    "infty": "oo",
    "cup": "U",
    "cdot": "*",
    "times": "*",
    "div": "/",
    "left": "",
    "right": "",
    "displaystyle": "",
    "quad": " ",
    "qquad": " ",
}
_SYMBOLS = {"\\\\": "\n", "\\!": "", "\\%": "%", "\\$": "$"}
_UNARY_WRAPPERS = frozenset({"text", "mathrm", "mathbf", "textbf", "textit", "mbox", "operatorname", "boxed", "overline"})
_FRACTIONS = frozenset({"frac", "dfrac", "tfrac", "cfrac"})
_SUM = re.compile(r"(?<=.)[+-]")
_ATOM = re.compile(r"-?[\d.,]+|[a-zA-Z]|pi|sqrt\([^()]*\)|\([^()]*\)")


def to_expression(latex: str) -> str:
    """Return `latex` as a plain expression; commands without a meaning here keep their name.

    Raises:
        ValueError: a command lacks its argument, or braces nest too deeply.
    """
    return _Reader(latex).sequence(depth=0).strip()


class _Reader:
    """Reads tokens left to right; each method consumes what it returns."""

    def __init__(self, latex: str) -> None:
        self._tokens: list[str] = _TOKEN.findall(latex)
        self._next = 0

    def sequence(self, *, depth: int) -> str:
        """Return everything up to the closing brace of this group, or the end."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"braces nest more than {_MAX_DEPTH} deep")
        written: list[str] = []
        while self._next < len(self._tokens):
            token = self._take()
            if token == "}":
                break
            written.append(self._meaning(token, depth))
        return "".join(written)

    def _take(self) -> str:
        if self._next >= len(self._tokens):
            raise ValueError("a command lacks its argument")
        self._next += 1
        return self._tokens[self._next - 1]

    def _meaning(self, token: str, depth: int) -> str:
        if token == "{":
            return self.sequence(depth=depth + 1)
        if not token.startswith("\\"):
            return token
        name = token[1:]
        if name in _FRACTIONS:
            return self._fraction(depth)
        if name == "sqrt":
            return self._root(depth)
        if name in _UNARY_WRAPPERS:
            return self._argument(depth)
        return _WORDS.get(name, name) if name.isalpha() else _SYMBOLS.get(token, " ")

    def _argument(self, depth: int) -> str:
        token = self._take()
        while token.isspace():
            token = self._take()
        return self._meaning(token, depth + 1)

    def _fraction(self, depth: int) -> str:
        """Read two arguments; the space in front keeps the whole part of a mixed number apart."""
        above, below = self._argument(depth), self._argument(depth)
        above = f"({above})" if _SUM.search(above) else above
        below = below if _ATOM.fullmatch(below) else f"({below})"
        return f" {above}/{below}"

    def _root(self, depth: int) -> str:
        if self._tokens[self._next : self._next + 1] != ["["]:
            return f"sqrt({self._argument(depth)})"
        index = ""
        while (token := self._take()) != "]":
            index += token
        return f"({self._argument(depth)})**(1/({index.removeprefix('[')}))"
