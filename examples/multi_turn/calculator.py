"""A conversation with a calculator: the policy writes <calc>12 * 7</calc>, reads <result>84</result>, and goes on.

prompt | 12 times 7 is <calc>12 * 7</calc>  <result>84</result>  so the answer is \\boxed{84}
mask     1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1  0 0 0 0 0 0 0 0 0 0  1 1 1 1 1 1 1 1 1 1 1 1 1 1
"""

from __future__ import annotations

import ast
import operator
import re

from qwench.rollout.generate import GenerateContext
from qwench.samples import Sample, Status

CALL_END = "</calc>"
RESULT_END = "</result>"
MAX_CALLS = 4
MAX_DIGITS = 30

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


async def generate(sample: Sample, context: GenerateContext) -> Sample:
    """Let the policy write until it stops by itself, answering its calls in between.

    Everything it needs to know stands in `sample.response`, so a sample that a partial rollout cut off simply goes on.
    """
    while True:
        turn = await context.generate(sample, stop=(CALL_END,))
        expression = open_call(sample.response)
        num_calls = sample.response.count(RESULT_END)
        if turn.status is not Status.COMPLETED or expression is None or num_calls == MAX_CALLS:
            return sample
        context.append_context(sample, f"<result>{calculate(expression)}{RESULT_END}")


def open_call(response: str) -> str | None:
    """Return the expression of a call that has no result yet."""
    calls = re.findall(r"<calc>(.*?)</calc>", response.rpartition(RESULT_END)[2], flags=re.DOTALL)
    return calls[-1] if calls else None


def calculate(expression: str) -> str:
    """Return the value of an expression of numbers, + - * / and parentheses, or what is wrong with it."""
    try:
        value = evaluate(ast.parse(expression.strip(), mode="eval").body)
        whole = isinstance(value, float) and value.is_integer()
        return str(int(value) if whole else value)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        return f"error: {type(error).__name__}"


def evaluate(node: ast.expr) -> int | float:
    """Compute one node; anything but arithmetic on bounded numbers is a ValueError."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and abs(number) < 10**MAX_DIGITS:
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(left), evaluate(right))
    raise ValueError(ast.dump(node))
