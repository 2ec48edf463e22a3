"""Parse a plain expression into sympy objects by the grammar below. The text is never evaluated.

    list      = relation ("," relation)*                              1,2  and  (x,y)  become tuples
    relation  = sum (("<" | "<=" | ">" | ">=") sum)?
    sum       = product (("+" | "-") product)*
    product   = unary (("*" | "/")? unary)*                           side by side is a product: 2x, 3(x+1)
    unary     = ("+" | "-") unary | power
    power     = postfix (("**" | "^") unary)?
    postfix   = atom "!"*
    atom      = number | name | function "(" list ")" | "(" list ")" | "[" list "]"
    function  = sqrt | ln | ... (("**" | "^") number)?                ln^2(x) is ln(x)^2

A name that is no constant, function or Greek letter is a product of its letters: `ab` is a*b, `a2` is a*2. A name with an
underscore is one symbol. These are the readings of sympy's own parser with implicit multiplication, which evaluates Python.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Callable
from typing import TypeAlias

import sympy

MAX_DEPTH = 50
_MAX_TOKENS = 1000
_MAX_EXPONENT = 10_000
_MAX_BITS = 100_000
"""Of a number that a power or a factorial makes."""
_MAX_DECIMAL_EXPONENT = 5000

Value: TypeAlias = "sympy.Basic | tuple[Value, ...] | list[Value]"
"""An expression, a relation, or a tuple or list of values."""

_TOKEN = re.compile(
    r"(?P<repeating>[0-9]*\.[0-9]*\[[0-9]+\])"
    r"|(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[^\W\d]\w*)"
    r"|(?P<operator>\*\*|<=|>=|[-+*/^()\[\],!<>])"
    r"|(?P<space>[ \t]+)"
)
_CONSTANTS = {"pi": sympy.pi, "oo": sympy.oo}
_FUNCTIONS: dict[str, Callable[..., sympy.Expr]] = {
    name: getattr(sympy, name)
    for name in (
        *("sqrt", "exp", "ln", "log", "re", "im"),
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    )
}
_RELATIONS = {"<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge}


class FormulaError(ValueError):
    """The text is no expression of the grammar, or one too large to build."""


def read_formula(text: str) -> Value:
    """Return the value of `text`.

    Raises:
        FormulaError: see the class.
    """
    return _Parser(_tokens(text)).whole()


def _tokens(text: str) -> list[tuple[str, str]]:
    """Split the text into (kind, text); quotes, backslashes, attribute access and the like are no tokens."""
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or "__" in match.group() or not _is_name_or_other(match):
            raise FormulaError(f"{text[position : position + 20]!r} cannot be read")
        if match.lastgroup != "space":
            assert match.lastgroup is not None, "every alternative is named"
            tokens.append((match.lastgroup, match.group()))
        position = match.end()
    if len(tokens) > _MAX_TOKENS:
        raise FormulaError(f"more than {_MAX_TOKENS} symbols")
    return [*tokens, ("end", "")]


def _is_name_or_other(match: re.Match[str]) -> bool:
    """Tell whether a name is made of letters; a raised 2 or a one half counts as a letter in regular expressions only."""
    return match.lastgroup != "name" or match.group().isidentifier()


class _Parser:
    """Reads tokens left to right by recursive descent; each method consumes what it returns."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def whole(self) -> Value:
        """Read everything."""
        value = self._list()
        self._expect("")
        return value

    def _list(self) -> Value:
        values = [self._relation()]
        is_tuple = False
        while self._accept(","):
            is_tuple = True
            if self._peek() in (("operator", ")"), ("end", "")):
                break
            values.append(self._relation())
        return tuple(values) if is_tuple else values[0]

    def _relation(self) -> Value:
        left = self._sum()
        kind, symbol = self._peek()
        if kind != "operator" or symbol not in _RELATIONS:
            return left
        self._next += 1
        relation = _RELATIONS[symbol](_expression(left), _expression(self._sum()))
        if not isinstance(relation, sympy.core.relational.Relational):
            raise FormulaError("a relation between numbers is no answer")
        return relation

    def _sum(self) -> Value:
        value = self._product()
        while (sign := self._accept("+", "-")) is not None:
            term = _expression(self._product())
            value = _expression(value) + term if sign == "+" else _expression(value) - term
        return value

    def _product(self) -> Value:
        value = self._unary()
        while True:
            sign = self._accept("*", "/")
            if sign is None and not self._begins_value():
                return value
            factor = _expression(self._unary())
            value = _expression(value) / factor if sign == "/" else _expression(value) * factor

    def _unary(self) -> Value:
        sign = self._accept("+", "-")
        if sign is None:
            return self._power()
        with_sign = _expression(self._nested(self._unary))
        return -with_sign if sign == "-" else with_sign

    def _power(self) -> Value:
        base = self._postfix()
        if self._accept("**", "^") is None:
            return base
        return _power(_expression(base), _expression(self._nested(self._unary)))

    def _postfix(self) -> Value:
        value = self._atom()
        while self._accept("!") is not None:
            value = _factorial(_expression(value))
        return value

    def _atom(self) -> Value:
        kind, text = self._peek()
        self._next += 1
        if kind == "number":
            return _number(text)
        if kind == "repeating":
            return _repeating_decimal(text)
        if kind == "name":
            return self._applied(_FUNCTIONS[text]) if text in _FUNCTIONS else _named(text)
        if text == "(":
            value = self._nested(self._list)
            self._expect(")")
            return value
        if text == "[":
            value = self._nested(self._list)
            self._expect("]")
            return list(value) if isinstance(value, tuple) else value  # [x] is x
        raise FormulaError(f"{text or 'the end'!r} is in the wrong place")

    def _applied(self, function: Callable[..., sympy.Expr]) -> sympy.Expr:
        """Read a function's exponent, if it has one, and its arguments."""
        exponent = None
        if self._accept("**", "^") is not None:
            kind, text = self._peek()
            if kind != "number":
                raise FormulaError("the exponent of a function must be a number")
            self._next += 1
            exponent = _number(text)
        self._expect("(")
        arguments = self._nested(self._list)
        self._expect(")")
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        try:
            value = function(*map(_expression, values))
        except TypeError as error:
            raise FormulaError(f"wrong number of arguments: {error}") from error
        return value if exponent is None else _power(value, exponent)

    def _nested(self, read: Callable[[], Value]) -> Value:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise FormulaError(f"nests more than {MAX_DEPTH} deep")
        value = read()
        self._depth -= 1
        return value

    def _begins_value(self) -> bool:
        kind, text = self._peek()
        return kind in ("number", "repeating", "name") or text == "("

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._next]

    def _accept(self, *symbols: str) -> str | None:
        kind, text = self._peek()
        if kind != "operator" or text not in symbols:
            return None
        self._next += 1
        return text

    def _expect(self, symbol: str) -> None:
        if self._peek()[1] != symbol:
            raise FormulaError(f"{symbol or 'the end'!r} is missing")
        self._next += 1


def _expression(value: Value) -> sympy.Expr:
    """Return an expression, with which one can calculate; relations, tuples and lists are refused."""
    if not isinstance(value, sympy.Expr):
        raise FormulaError("a list or relation is in the place of a number")
    return value


def _number(text: str) -> sympy.Expr:
    digits = text.removesuffix(".")  # a full stop that ends the sentence
    if digits.isdecimal():
        return sympy.Integer(int(digits))
    _, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > _MAX_DECIMAL_EXPONENT:
        raise FormulaError(f"{text} is too large or small")
    return sympy.Float(text)


def _repeating_decimal(text: str) -> sympy.Expr:
    """Read `0.1[6]`, which is 1/6."""
    whole, _, rest = text.partition(".")
    fixed, _, repeated = rest.rstrip("]").partition("[")
    digits = int((whole or "0") + fixed + repeated) - int((whole or "0") + fixed)
    return sympy.Rational(digits, 10 ** len(fixed) * (10 ** len(repeated) - 1))


def _named(name: str) -> sympy.Expr:
    """Return a constant, a symbol, or the product of a word's letters and digits."""
    if keyword.iskeyword(name):
        raise FormulaError(f"{name!r} is a word")
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if len(name) == 1 or "_" in name or _is_greek(name):
        return sympy.Symbol(name)
    factors = [
        sympy.Integer(int(part)) if part.isdecimal() else sympy.Symbol(part) for part in re.findall(r"[0-9]+|[^0-9]", name)
    ]
    return sympy.Mul(*factors)


def _is_greek(name: str) -> bool:
    try:
        unicodedata.lookup(f"GREEK SMALL LETTER {name}")
    except KeyError:
        return False
    return True


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if exponent.is_Number and exponent.is_finite and abs(exponent) > _MAX_EXPONENT:
        raise FormulaError("the exponent is too large")
    if isinstance(base, sympy.Rational) and isinstance(exponent, sympy.Rational):
        bits = max(abs(int(base.p)).bit_length(), int(base.q).bit_length())
        if bits * (abs(exponent) + 1) > _MAX_BITS:
            raise FormulaError("the power is too large")
    return base**exponent


def _factorial(value: sympy.Expr) -> sympy.Expr:
    if value.is_Number and abs(value) > _MAX_EXPONENT // 10:
        raise FormulaError("the factorial is too large")
    return sympy.factorial(value)
