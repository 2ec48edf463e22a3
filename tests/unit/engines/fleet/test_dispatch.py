"""Requests whose engines are lost one after the other."""

import asyncio
from types import SimpleNamespace

import pytest

from qwench.engines.fleet import dispatch
from qwench.engines.fleet.dispatch import Dispatcher
from qwench.engines.fleet.members import Member, Members
from qwench.engines.protocol import GenerateRequest, SamplingParams
from qwench.errors import EngineLostError


def test_a_request_has_six_tries_under_names_of_their_own_with_pauses_that_grow(monkeypatch):
    names, pauses = [], []

    async def lose(request: GenerateRequest) -> None:
        names.append(request.request_id)
        raise EngineLostError("gone")

    async def examine(*_: object) -> None: ...

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    async def generate() -> None:
        supervisor = SimpleNamespace(has_router=False, examine=examine, examine_router=examine)
        members = Members([Member(engine=SimpleNamespace(generate=lose))])
        dispatcher = Dispatcher(members, router=None, supervisor=supervisor, can_republish=False)
        await dispatcher.generate(GenerateRequest(request_id="r", input_ids=(1,), sampling=SamplingParams(max_new_tokens=1)))

    monkeypatch.setattr(dispatch.asyncio, "sleep", note)
    with pytest.raises(EngineLostError, match="gone"):
        asyncio.run(generate())
    assert names == ["r", "r~2", "r~3", "r~4", "r~5", "r~6"]
    assert pauses == [0, 0.5, 1.0, 1.5, 2.0]
