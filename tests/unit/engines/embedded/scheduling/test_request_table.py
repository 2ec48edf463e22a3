"""The unfinished requests of an engine, by their ids."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qwench.engines.embedded.scheduling.request_table import RequestTable
from qwench.engines.protocol import FinishReason
from qwench.errors import EngineError


class Running:
    """A request that notes how it ended."""

    def __init__(self, name: str) -> None:
        self.request, self.finish_reason = SimpleNamespace(request_id=name), None
        self.answered: list[object] = []
        self.errors: list[Exception] = []
        self.future, self.fail = SimpleNamespace(done=lambda: bool(self.answered)), self.errors.append

    def answer(self, tokenizer: object) -> None:
        self.answered.append(tokenizer)


@pytest.fixture
def table() -> RequestTable:
    table = RequestTable("tokenizer")
    for name in ("a", "ab", "b"):
        table.add(Running(name))
    return table


@pytest.mark.parametrize(
    ("request_id", "begins", "ended"),
    [(None, False, ["a", "ab", "b"]), ("a", False, ["a"]), ("a", True, ["a", "ab"]), ("c", True, [])],
)
def test_an_abort_ends_the_requests_that_its_id_means(table, request_id, begins, ended):
    table.abort(request_id, begins=begins)
    assert [one.request.request_id for one in table.aborted()] == ended
    assert {one.finish_reason for one in table.aborted()} <= {FinishReason.ABORT} and len(table) == 3


def test_an_id_is_free_again_when_its_request_was_answered(table):
    first = next(iter(table))
    with pytest.raises(EngineError, match="request id 'a' is in use; ids of unfinished requests must differ"):
        table.check_new("a")
    table.answer(first)
    assert first.answered == ["tokenizer"] and [one.request.request_id for one in table] == ["ab", "b"]
    table.check_new("a")
    table.add(Running("a"))
    table.drop(first)
    assert table.aborted() == [], "the other request of this id goes on"
    table.drop(again := list(table)[-1])
    assert table.aborted() == [again]


def test_a_failure_ends_all_requests_and_refuses_new_ones_by_the_first_one(table):
    answered, *others = table
    answered.answered.append("already")
    first, second = EngineError("no memory"), EngineError("closed")
    for failure in (first, second):
        table.fail(failure)
    assert (answered.errors, [one.errors for one in others], len(table)) == ([], [[first]] * 2, 0)
    with pytest.raises(EngineError, match="request 'c' refused: no memory") as refused:
        table.check_new("c")
    assert refused.value.__cause__ is first
