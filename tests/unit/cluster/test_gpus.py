"""Who gives memory up when, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from qwench.cluster.gpus import ColocatedGpus
from qwench.engines.client import HttpEngine
from qwench.errors import EngineError
from qwench.observability.timing import PhaseTimer


class Recorded:
    """An engine pool or a learner that says what it was told to do."""

    def __init__(self, name: str, events: list[str], engines: Sequence[object] = ()) -> None:
        self._name = name
        self._events = events
        self.engines = engines

    def sleep(self, *tags: object) -> None:
        self._events.append(f"{self._name} sleep")

    def release_cache(self) -> None:
        self._events.append(f"{self._name} release")

    def wake(self, *tags: object) -> None:
        self._events.append(f"{self._name} wake")


@pytest.fixture
def events() -> list[str]:
    return []


def colocated(events: list[str], *, engines: Sequence[object] = (), timer: object = None, **offload: bool) -> ColocatedGpus:
    """Return the owner of devices that a pool and a learner share."""
    both = {"offload_rollout": True, "offload_train": True} | offload
    pool = Recorded("engines", events, engines)
    return ColocatedGpus(pool, timer or PhaseTimer(), weights_may_alias=True, **both)  # type: ignore[arg-type]


def hold(gpus: ColocatedGpus, events: list[str], *, then: Callable[[], None] = lambda: None) -> None:
    with gpus.held_by(Recorded("learner", events)):
        events.append("learn")
        then()


def test_engines_sleep_while_the_learner_holds_the_devices_and_it_sleeps_while_they_do(events: list[str]) -> None:
    gpus = colocated(events)
    for _ in range(2):
        hold(gpus, events)
    assert events == ["engines sleep", "learner wake", "learn", "learner sleep", "engines wake"] * 2


def test_moving_memory_is_a_phase_of_the_step(events: list[str]) -> None:
    @contextmanager
    def phase(name: str) -> Iterator[None]:
        events.append(f"begin {name}")
        yield
        events.append(f"end {name}")

    hold(colocated(events, timer=SimpleNamespace(phase=phase)), events)
    assert events == [
        "begin offload", "engines sleep", "learner wake", "end offload", "learn",
        "begin offload", "learner sleep", "engines wake", "end offload",
    ]  # fmt: skip


def test_engines_that_made_room_for_the_learner_to_be_built_are_not_put_to_sleep_twice(events: list[str]) -> None:
    gpus = colocated(events)
    gpus.make_room()
    events.append("build")
    hold(gpus, events)
    assert events == ["engines sleep", "build", "learner wake", "learn", "learner sleep", "engines wake"]
    events.clear()
    hold(gpus, events)
    assert events[0] == "engines sleep"


def test_the_learner_keeps_the_devices_though_the_engines_have_ended(events: list[str], caplog) -> None:
    colocated(events).keep_for(Recorded("learner", events))
    assert events == ["engines sleep", "learner wake"] and not caplog.records
    events.clear()

    class Gone(Recorded):
        def sleep(self, *tags: object) -> None:
            raise EngineError("no answer")

    gpus = ColocatedGpus(
        Gone("engines", events),
        PhaseTimer(),
        weights_may_alias=True,
        offload_rollout=True,
        offload_train=True,  # type: ignore[arg-type]
    )
    gpus.keep_for(Recorded("learner", events))
    assert events == ["learner wake"] and "the engines keep their memory: no answer" in caplog.text
    with pytest.raises(EngineError, match="no answer"):
        gpus.make_room()  # it is asked for again


def test_what_is_not_offloaded_stays(events: list[str]) -> None:
    gpus = colocated(events, offload_rollout=False, offload_train=False)
    gpus.make_room()
    hold(gpus, events)
    assert events == ["learner wake", "learn", "learner release"]


@pytest.mark.parametrize("sleeps", [True, False])
def test_the_learner_gives_its_cache_to_engines_of_other_processes_and_not_to_one_of_its_own_that_wakes(
    events: list[str], sleeps: bool
) -> None:
    asleep = ["learner sleep"] * sleeps
    for engine, released in ((object(), []), (HttpEngine("http://host:1"), ["learner release"])):
        events.clear()
        hold(colocated(events, engines=[engine], offload_train=sleeps), events)
        assert events == ["engines sleep", "learner wake", "learn", *asleep, *released, "engines wake"]
