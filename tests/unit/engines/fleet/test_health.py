"""Which answers of an engine mean that it is lost."""

from __future__ import annotations

import asyncio

import pytest

from qwench.config.sections.engine import EngineConfig
from qwench.engines.fleet.health import Supervisor
from qwench.engines.fleet.members import Member, Members, MemberState
from qwench.engines.protocol import EngineStats
from qwench.errors import EngineError, EngineLostError
from tests.deadlines import patient
from tests.unit.engines.scripted import ScriptedEngine, ScriptedServer

RULES = EngineConfig(rollout_health_check_timeout=patient(0.2))


class AnsweringEngine(ScriptedEngine):
    """Answers a question for its state with an error, if it has one."""

    error: EngineError | None = None

    async def stats(self) -> EngineStats:
        if self.error is not None:
            raise self.error
        return await super().stats()


def is_lost(engine: AnsweringEngine, *, asleep: bool) -> bool:
    async def scenario() -> bool:
        member = Member(engine=engine, server=ScriptedServer(engine), url="a")
        supervisor = Supervisor(Members([member]), RULES, router=None)
        if asleep:
            await supervisor.hold()
        await supervisor.examine(member)
        lost = supervisor.num_lost == 1
        assert lost == (member.state is not MemberState.READY)
        await supervisor.close()
        return lost

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "lost"), [(None, False), (EngineError("it sleeps"), False), (EngineLostError("no connection"), True)]
)
def test_an_engine_that_sleeps_is_lost_only_if_it_does_not_answer(error, lost):
    engine = AnsweringEngine("a")
    engine.error = error
    assert is_lost(engine, asleep=True) is lost
    assert not is_lost(engine, asleep=False), "an engine that is awake is asked for its health"


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("trouble", ["hangs", "down"])
def test_an_engine_that_hangs_or_is_down_is_lost_awake_and_asleep(asleep, trouble):
    engine = AnsweringEngine("a")
    setattr(engine, trouble, True)
    assert is_lost(engine, asleep=asleep)


class AnsweringRouter:
    """Runs and answers, and counts the checks."""

    num_checks = 0

    def is_running(self) -> bool:
        return True

    async def check(self) -> None:
        self.num_checks += 1


def test_a_router_that_answered_is_checked_again():
    async def scenario() -> int:
        router, engine = AnsweringRouter(), AnsweringEngine("a")
        supervisor = Supervisor(Members([Member(engine=engine, server=None, url="a")]), RULES, router=router)
        for _ in range(3):
            await supervisor.examine_router()
        assert supervisor.has_router
        await supervisor.close()
        return router.num_checks

    assert asyncio.run(scenario()) == 3
