"""The small changes that `mutations.py` makes: what they are called, and the node that takes the old one's place."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from itertools import pairwise

Change = tuple[str, ast.AST | None]
"""The kind and the new node; None removes a statement."""

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "reversed": "list"}
_NAME = re.compile(r"[\w./-]*[A-Za-z]{2}[\w./-]*")
"""What keys, metrics, flags and files are called: no words of a sentence."""
_MAKERS_OF_TYPES = ("TypeVar", "ParamSpec", "NewType")
_LISTS_OF_NAMES = ("__all__", "__slots__")
_CALLS_WITHOUT_MEANING = ("_log", "logger", "_logger", "log", "logging", "warnings")


def code_of(tree: ast.AST) -> Iterator[ast.AST]:
    """Return the nodes that compute: no annotations, no messages of errors, no log lines."""
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "cast":
        tree = tree.args[1]
    yield tree
    for field, value in ast.iter_fields(tree):
        silent = field in ("annotation", "returns", "decorator_list", "msg") or (field == "exc" and isinstance(tree, ast.Raise))
        silent |= field == "type" and isinstance(tree, ast.ExceptHandler)  # a set of errors, whose order means nothing
        silent |= field == "func" and isinstance(value, ast.Subscript)  # list[Type](): a type, as in an annotation
        if silent or (isinstance(tree, ast.Assign) and _is_alias(tree)):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST) and not (isinstance(node, ast.Expr) and _is_speech(node.value)):
                yield from code_of(node)


def _is_speech(node: ast.expr) -> bool:
    """Tell whether a statement is a docstring, or a call that logs."""
    return isinstance(node, ast.Constant) or _says_something(node)


def _is_alias(node: ast.Assign) -> bool:
    """Tell whether a statement names a type, as `Loss = Callable[..., Tensor]`, or lists names."""
    target, value = node.targets[0], node.value
    if not isinstance(target, ast.Name):
        return False
    match value:
        case ast.Call(func=ast.Name(id=name)) if name in _MAKERS_OF_TYPES:
            return True
        case ast.Subscript() | ast.BinOp(op=ast.BitOr()):
            return target.id[0].isupper() and (len(target.id) == 1 or not target.id.isupper())
    return target.id in _LISTS_OF_NAMES


def changes_of(node: ast.AST) -> Iterator[Change]:
    """Return the changes of one node, always in the same order."""
    yield from _of_operators(node)
    yield from _of_conditions(node)
    yield from _of_calls(node)
    yield from _of_statements(node)
    yield from _of_names_and_entries(node)
    yield from _of_order(node)


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    result = copy.copy(node)
    for name, value in fields.items():
        setattr(result, name, value)
    return result


def _of_operators(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Compare(ops=[first, *rest]):
            for turned in _COMPARISONS[type(first)]:
                yield "comparison", _changed(node, ops=[turned(), *rest])
        case ast.BinOp(op=operator, left=left) if type(operator) in _ARITHMETIC and not _is_text(left):
            yield "arithmetic", _changed(node, op=_ARITHMETIC[type(operator)]())
        case ast.AugAssign(op=operator) if type(operator) in _ARITHMETIC:
            yield "arithmetic", _changed(node, op=_ARITHMETIC[type(operator)]())
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield "sign", operand
        case ast.Constant(value=bool(value)):
            yield "constant", _changed(node, value=not value)
        case ast.Constant(value=int(value)):
            yield "off by one", _changed(node, value=value + 1)
        case ast.Constant(value=float(value)):
            yield "constant", _changed(node, value=2 * value + 1.0)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _of_conditions(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.If(test=test) | ast.IfExp(test=test) if not _is_type_checking(test):
            yield "negated condition", _changed(node, test=_negated(test))
        case ast.BoolOp(op=operator):
            yield "and/or", _changed(node, op=ast.Or() if isinstance(operator, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "dropped not", operand
        case ast.comprehension(ifs=[first, *rest]):
            yield "dropped filter", _changed(node, ifs=rest)
            yield "negated filter", _changed(node, ifs=[_negated(first), *rest])


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(op=ast.Not(), operand=test)


def _of_calls(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in _NAMES:
            yield name, _changed(node, func=ast.Name(id=_NAMES[name], ctx=ast.Load()), keywords=_kept(node))
        case ast.Call(args=[first, second, *rest]) if not _says_something(node):
            yield "swapped arguments", _changed(node, args=[second, first, *rest])
    match node:
        case ast.keyword(arg="reverse", value=value):
            yield "reverse", _changed(node, value=_negated(value))


def _kept(call: ast.Call) -> list[ast.keyword]:
    return [] if isinstance(call.func, ast.Name) and call.func.id == "sorted" else call.keywords


def _of_statements(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "dropped return", _changed(node, value=ast.Constant(value=None))
        case ast.Expr(value=ast.Call() | ast.Await(value=ast.Call())) if not _says_something(node.value):
            yield "removed line", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign() | ast.Delete():
            yield "removed line", ast.Pass()
        case ast.Raise():
            yield "dropped raise", ast.Pass()
        case ast.Break():
            yield "break", ast.Continue()
        case ast.Continue():
            yield "continue", ast.Break()
        case ast.With(items=[item], body=body) if item.optional_vars is None:
            yield "removed with", ast.If(test=ast.Constant(value=1), body=body, orelse=[])
        case ast.AsyncWith(items=[item], body=body) if item.optional_vars is None:
            yield "removed with", ast.If(test=ast.Constant(value=1), body=body, orelse=[])
        case ast.Try(finalbody=[_, *_]):
            yield "removed finally", _without_finally(node)


def _of_names_and_entries(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Tuple(elts=[ast.Tuple(), ast.Tuple(), *_] as rows, ctx=ast.Load()):
            for row in rows:
                yield "dropped row", _changed(node, elts=[kept for kept in rows if kept is not row])
        case ast.Constant(value=str(value)) if _NAME.fullmatch(value):
            yield "name", _changed(node, value=value + "x")
        case ast.Call(keywords=[_, *_] as keywords) if not _says_something(node):
            for dropped in keywords:
                if dropped.arg not in (None, "help", "default", "metavar"):
                    yield "dropped keyword", _changed(node, keywords=[kept for kept in keywords if kept is not dropped])
        case ast.Tuple(elts=[first, second, *rest], ctx=ast.Load()) if not isinstance(first, ast.Constant):
            yield "swapped pair", _changed(node, elts=[second, first, *rest])
        case ast.List(elts=[_, *rest], ctx=ast.Load()) | ast.Set(elts=[_, *rest]) if rest:
            yield "dropped entry", _changed(node, elts=rest)
        case ast.Dict(keys=[_, *keys], values=[_, *values]) if keys:
            yield "dropped entry", _changed(node, keys=keys, values=values)


def _of_order(node: ast.AST) -> Iterator[Change]:
    body = getattr(node, "body", None)
    if isinstance(node, ast.stmt) and isinstance(body, list) and not isinstance(node, ast.ClassDef):
        for index, (first, second) in enumerate(pairwise(body)):
            if _acts(first) and _acts(second) and not isinstance(first, ast.Assign):
                yield "order", _changed(node, body=[*body[:index], second, first, *body[index + 2 :]])


def _acts(node: ast.stmt) -> bool:
    """Tell whether a statement calls something for its effect, or writes an attribute or an entry."""
    match node:
        case ast.Expr(value=ast.Call() | ast.Await() as value):
            return not _says_something(value)
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return True
    return False


def _without_finally(node: ast.Try) -> ast.AST:
    if node.handlers:
        return _changed(node, finalbody=[])
    return ast.If(test=ast.Constant(value=1), body=node.body, orelse=[])


def _says_something(call: ast.AST) -> bool:
    """Tell whether a call logs or warns: its words are not tested."""
    while isinstance(call, ast.Await):
        call = call.value
    target = call.func if isinstance(call, ast.Call) else call
    while isinstance(target, ast.Attribute):
        target = target.value
    return isinstance(target, ast.Name) and target.id in _CALLS_WITHOUT_MEANING
