r"""LaTeX answers: turned into the plain expression that `formula` reads, and in the normal form of the MATH data set.

`\frac{\sqrt{3}}{x+1}` -> ` sqrt(3)/(x+1)`

Symbols, fonts and spaces mean what pylatexenc's tables say, as in slime's grader. A small reader takes fractions, roots, text
and commands without arguments, in microseconds. All other LaTeX goes through pylatexenc. Both write fractions and roots alike.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec
from pylatexenc.latex2text import get_default_latex_context_db as default_texts
from pylatexenc.latexwalker import LatexMacroNode, LatexWalker
from pylatexenc.latexwalker import get_default_latex_context_db as default_syntax
from pylatexenc.macrospec import LatexContextDb, MacroSpec

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[{}]|[^\\{}]", re.DOTALL)
_MAX_DEPTH = 40  # braces within braces; answers have a few, and Python's stack has an end
_WORDS = {
    "pi": "pi",
    "infty": "oo",
    "cup": "U",
    "cdot": "*",
    "times": "*",
    "div": "/",
    "ne": "\N{NOT EQUAL TO}",
    "leqslant": "\N{LESS-THAN OR EQUAL TO}",
    "geqslant": "\N{GREATER-THAN OR EQUAL TO}",
    "left": "",
    "right": "",
    "displaystyle": "",
    "quad": " ",
    "qquad": " ",
}
_SYMBOLS = {
    "\\\\": "\n",
    "\\!": "",
    "\\%": "%",
    "\\$": "$",
    "\\,": " ",
    "\\;": " ",
    "\\:": " ",
    "\\ ": " ",
    "\\{": " ",
    "\\}": " ",
}
_PLAIN = frozenset(
    {
        *("text", "textbf", "textit", "mathrm", "mathbf", "mathit", "mathsf", "mathtt", "boldsymbol", "bm", "pmb"),
        *("mbox", "fbox", "boxed", "operatorname", "overline"),
    }
)
"""Commands of which only the argument counts."""
_FRACTIONS = frozenset({"frac", "dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"})
_BOX_OF_TEXT = re.compile(r"\\mbox *\{[^{}]*\}")
_COMMAND = re.compile(r"\\(?:([a-zA-Z]+)|(.))", re.DOTALL)
_SPECIAL = re.compile(r"[&#`']|--")
"""Characters that pylatexenc reads as commands."""
_SUM = re.compile(r"(?<=.)[+-]")
_ATOM = re.compile(r"-?[\d.,]+|[a-zA-Z]|pi|sqrt\([^()]*\)|\([^()]*\)")

_SILENT = ("input", "include", "today")
"""Commands that would read a file, or whose text depends on the date."""
_UNICODE = str.maketrans(
    {
        "\N{SQUARE ROOT}": "sqrt",
        "\N{GREEK SMALL LETTER PI}": "pi",
        "\N{INFINITY}": "oo",
        "\N{UNION}": "U",
        "\N{MIDDLE DOT}": "*",
        "\N{MULTIPLICATION SIGN}": "*",
        "\N{DIVISION SIGN}": "/",
    }
)


def to_expression(latex: str) -> str:
    r"""Return `latex` as a plain expression; a command that neither we nor pylatexenc know is left out.

    An `\mbox` beside a value is its unit and left out, as in slime. An `\mbox` alone is the value.

    Raises:
        ValueError: a command lacks its argument, or braces nest too deeply.
    """
    if "\\mbox" in latex:
        latex = _BOX_OF_TEXT.sub("", latex).strip() or latex
    simple = not _SPECIAL.search(latex) and all(
        _is_simple(name) if name else f"\\{symbol}" in _SYMBOLS for name, symbol in _COMMAND.findall(latex)
    )
    expression = _Reader(latex).sequence(depth=0) if simple else _by_library(latex)
    return expression.translate(_UNICODE).strip()


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
            if token == "}" and depth:
                break
            if token == "}":  # it closes nothing
                continue
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
            return " " if token == "~" else token
        name = token[1:]
        if name in _FRACTIONS:
            return _fraction(self._argument(depth), self._argument(depth))
        if name == "sqrt":
            return self._root(depth)
        if name in _PLAIN:
            return self._argument(depth)
        return _SYMBOLS[token] if token in _SYMBOLS else _symbol(name) or ""

    def _argument(self, depth: int) -> str:
        token = self._take()
        while token.isspace():
            token = self._take()
        return self._meaning(token, depth + 1)

    def _root(self, depth: int) -> str:
        if self._tokens[self._next : self._next + 1] != ["["]:
            return _root(self._argument(depth), None)
        index = ""
        while (token := self._take()) != "]":
            index += token
        return _root(self._argument(depth), index.removeprefix("["))


def _is_simple(name: str) -> bool:
    """Tell whether the small reader knows the command."""
    return name in _PLAIN or name in _FRACTIONS or name == "sqrt" or _symbol(name) is not None


@lru_cache(maxsize=1024)
def _symbol(name: str) -> str | None:
    """Return the text of a command without arguments; None: it has some, or a function makes its text."""
    if name in _WORDS:
        return _WORDS[name]
    if name in ("begin", "end"):
        return None
    syntax, texts = _library()
    arguments, text = syntax.get_macro_spec(name), texts.latex_context.get_macro_spec(name)
    if arguments is not None and arguments.args_parser.argspec:
        return None
    if text is None or not text.simplify_repl:
        return ""  # unknown, or a font that takes effect from here on
    return text.simplify_repl if isinstance(text.simplify_repl, str) else None


def _fraction(above: str, below: str) -> str:
    """Write a fraction; the space in front keeps the whole part of a mixed number apart."""
    above, below = above.strip(), below.strip()
    above = f"({above})" if _SUM.search(above) else above
    below = below if _ATOM.fullmatch(below) else f"({below})"
    return f" {above}/{below}"


def _root(radicand: str, index: str | None) -> str:
    return f"sqrt({radicand})" if index is None else f"({radicand})**(1/({index}))"


def _by_library(latex: str) -> str:
    if latex.count("{") + latex.count("\\") > _MAX_DEPTH * 5 or _depth(latex) > _MAX_DEPTH:
        raise ValueError(f"braces nest more than {_MAX_DEPTH} deep")
    syntax, texts = _library()
    nodes, _, _ = LatexWalker(latex, latex_context=syntax).get_latex_nodes()
    return str(texts.nodelist_to_text(nodes))


def _depth(latex: str) -> int:
    depth = deepest = 0
    for character in latex:
        depth += (character in "{[(") - (character in "}])")
        deepest = max(deepest, depth)
    return deepest


@lru_cache(maxsize=1)
def _library() -> tuple[LatexContextDb, LatexNodes2Text]:
    """Return pylatexenc's syntax of commands and its text writer. Both take a while to build."""
    logging.getLogger("pylatexenc").setLevel(logging.CRITICAL)  # it warns of broken LaTeX, which models write every day
    syntax = default_syntax()
    fractions = [MacroSpec(name, "{{") for name in _FRACTIONS]
    plain = [MacroSpec(name, "{") for name in _PLAIN]
    syntax.add_context_category("answers", macros=[*fractions, *plain, MacroSpec("sqrt", "[{")], prepend=True)
    texts = default_texts()
    macros = [
        *(MacroTextSpec(name, simplify_repl=_library_fraction) for name in _FRACTIONS),
        *(MacroTextSpec(name, discard=False) for name in _PLAIN),
        *(MacroTextSpec(name, discard=True) for name in _SILENT),
        MacroTextSpec("sqrt", simplify_repl=_library_root),
    ]
    texts.add_context_category("answers", macros=macros, prepend=True)
    return syntax, LatexNodes2Text(latex_context=texts)


def _library_fraction(node: LatexMacroNode, l2tobj: LatexNodes2Text) -> str:
    above, below = (str(l2tobj.node_arg_to_text(node, k)).translate(_UNICODE) for k in range(2))
    return _fraction(above, below)


def _library_root(node: LatexMacroNode, l2tobj: LatexNodes2Text) -> str:
    index, radicand = (str(l2tobj.node_arg_to_text(node, k)).translate(_UNICODE) for k in range(2))
    return _root(radicand, index or None)


_ALL_TEXT = re.compile(r"^\\text\{(?P<text>.+?)\}$")
_REWRITES = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_UNIT = "\\text{ "  # `\text{` followed by a space begins a unit
_BARE_SQRT = re.compile(r"\\sqrt([^{])")
_BARE_FRAC = re.compile(r"\\frac([^{])(.)")
_SLASH = re.compile(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))")


def normal_form(answer: str) -> str:
    r"""Return the normal form of `answer`; an answer that the rules cannot read is returned unchanged.

    `\dfrac12` and `1/2` -> `\frac{1}{2}`; `x = 34` -> `34`; `34\text{ cm}` -> `34`; `.5` -> `\frac{1}{2}`.

    Source: the rules of Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset" (arXiv 2103.03874).
    """
    answer = answer.strip()
    if wrapped := _ALL_TEXT.search(answer):
        answer = wrapped.group("text").strip()
    text = answer
    for written, normal in _REWRITES:
        text = text.replace(written, normal)
    if text.count(_UNIT) > 1:
        return answer
    text = text.partition(_UNIT)[0].replace("\\%", "")
    text = _without_left_hand_side(_with_leading_zeros(text))
    text = _BARE_SQRT.sub(r"\\sqrt{\1}", text).replace(" ", "")
    return _with_plain_fractions(text)


def _with_leading_zeros(text: str) -> str:
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    return "0" + text if text.startswith(".") else text


def _without_left_hand_side(text: str) -> str:
    """Drop a short name before the only equals sign: `x=34` answers the same as `34`."""
    name, equals, value = text.partition("=")
    return value if equals and "=" not in value and len(name) <= 2 else text


def _with_plain_fractions(text: str) -> str:
    text = _BARE_FRAC.sub(lambda frac: f"\\frac{{{frac[1]}}}" + ("{" if frac[2] == "{" else f"{{{frac[2]}}}"), text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return _SLASH.sub(r"\\frac{\1}{\2}", text) if _SLASH.fullmatch(text) else text
