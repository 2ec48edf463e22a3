"""The process that does algebra for a `WorkerPool`, driven over its standard streams: sympy may take all time or all memory.

    starts -> imports sympy, says it is ready -> forks a child, which answers some questions and ends -> forks the next ...

A child, and all memory that its questions took, ends after a few hundred questions. The pool kills a worker that is late; an
alarm ends a busy one whose pool is gone.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import BinaryIO

import sympy

from qwench.observability.stopping import end_with_parent
from qwench.rewards.formula import FormulaError, Value, read_formula
from qwench.rewards.messages import decode, read_body, write_message
from qwench.samples import Json

MEMORY_LIMIT_BYTES = 4 * 2**30
"""Address space of one worker: a large power must not take the trainer's memory."""
QUESTIONS_PER_CHILD = 200
_ALARM_FACTOR = 3.0  # times the deadline: the pool always kills first while it lives
_MORE_TO_COME, _END_OF_INPUT = 0, 1
Judge = Callable[[Iterable[tuple[str, str]]], str]
"""Returns the reason of the verdict on pairs of (answer, label)."""


def main() -> None:
    """Answer questions until standard input ends."""
    serve(settle)


def serve(judge: Judge) -> None:
    """Answer questions by this judge until standard input ends."""
    end_with_parent(os.getppid())  # a worker that is stopped does not see the end of its input
    with suppress(ValueError, OSError):  # the machine may allow less, or not know this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not get between the messages
    judge([("x+1", "1+x")])  # fills sympy's caches, so the first answer's deadline need not pay for them
    write_message(answers, {"ready": True})
    while _serve_in_child(judge, questions, answers) == _MORE_TO_COME:
        pass


def _serve_in_child(judge: Judge, questions: BinaryIO, answers: BinaryIO) -> int:
    """Fork a child that answers; return its exit code once it has ended."""
    worker = os.getpid()
    child = os.fork()
    if child == 0:
        end_with_parent(worker)
        os._exit(_serve(judge, questions, answers))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _serve(judge: Judge, questions: BinaryIO, answers: BinaryIO) -> int:
    for _ in range(QUESTIONS_PER_CHILD):
        body = read_body(questions)
        if body is None:
            return _END_OF_INPUT
        question = decode(body)
        signal.setitimer(signal.ITIMER_REAL, _ALARM_FACTOR * question["deadline_s"])
        answer = _answer(judge, question)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        write_message(answers, answer)
    return _MORE_TO_COME


def _answer(judge: Judge, question: Json) -> Json:
    try:
        return {"reason": judge([(answer, label) for answer, label in question["pairs"]])}
    except Exception as error:  # noqa: BLE001 - the border of the process: the pool reports it as grader_error
        return {"error": f"{type(error).__name__}: {error}"}


def settle(pairs: Iterable[tuple[str, str]]) -> str:
    """Return `sympy_equal` if both expressions of every pair are equal by algebra, else `wrong` or `unparseable`.

    It decides as slime's sympy grader, and may take all time or all memory: call it in a process that can be killed.
    """
    for answer, label in pairs:
        try:
            left, right = read_formula(answer), read_formula(label)
        except (FormulaError, ArithmeticError, ValueError, TypeError, AttributeError):  # sympy refuses numbers in many ways
            return "unparseable"
        if not _equal(left, right):
            return "wrong"
    return "sympy_equal"


def _equal(left: Value, right: Value) -> bool:
    """Compare expressions by algebra, and relations, tuples and lists as they are written."""
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return bool(sympy.simplify(left - right) == 0)
    return bool(left == right)
