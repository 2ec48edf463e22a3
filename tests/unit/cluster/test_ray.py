"""What is asked of Ray, and what its answers and failures mean. Ray itself is played; e2e/test_ray.py has the real one."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from qwench.cluster import ray as cluster_ray
from qwench.cluster.bundles import Bundles, EnginePlace, Seat
from qwench.cluster.messages import Answer, Call, Death
from qwench.cluster.ray import RayCluster, RayRanks, RayServer
from qwench.cluster.ray_actors import EngineActor, TrainerActor
from qwench.errors import ConfigError, EngineError, TrainingError
from qwench.observability import processes
from qwench.wire.addresses import Placement

VISIBLE = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES": "1"}


class Reference:
    """What a call on an actor returns: its value or error is known at once, if it ever is."""

    def __init__(self, value: object, *, is_ready: bool = True) -> None:
        self.value, self.is_ready = value, is_ready

    def future(self) -> Future[object]:
        return Future()


class PlayedActor:
    """Answers each method as its table says, and notes the calls."""

    def __init__(self, answers: dict[str, object], options: dict[str, Any] | None = None) -> None:
        self._answers, self.options, self.calls = answers, options or {}, []

    def __getattr__(self, name: str) -> SimpleNamespace:
        def remote(*arguments: object, **keywords: object) -> Reference:
            self.calls.append((name, *arguments, *([keywords] if keywords else [])))
            answer = self._answers.get(name)
            return answer if isinstance(answer, Reference) else Reference(answer)

        return SimpleNamespace(remote=remote)


class PlayedRay:
    """The part of Ray's module that is used."""

    def __init__(self, **resources: float) -> None:
        self.resources, self.notes, self.actors = resources, [], []
        self.timeouts: list[float | None] = []
        self.waits: list[str] = []
        self.answers: Callable[[type, int], dict[str, object]] = lambda _cls, _number: {}
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, cls: type | None = None, **groups: object) -> Any:
        def options(**words: Any) -> SimpleNamespace:
            def start() -> PlayedActor:
                kind = {"cls": of, "groups": groups}
                actor = PlayedActor(self.answers(of, sum(one.options["cls"] is of for one in self.actors)), kind | words)
                self.actors.append(actor)
                return actor

            return SimpleNamespace(remote=start)

        def made(given: type) -> SimpleNamespace:
            nonlocal of
            of = given
            return SimpleNamespace(options=options)

        of: Any = cls
        return made if cls is None else made(cls)

    def get(self, asked: Any, timeout: float | None = None) -> Any:
        self.timeouts.append(timeout)
        values = [one.value for one in (asked if isinstance(asked, list) else [asked])]
        for value in values:
            if isinstance(value, Exception):
                raise value
        return values if isinstance(asked, list) else values[0]

    def wait(self, asked: list[Reference], *, num_returns: int = 1, timeout: float | None = None) -> tuple[list, list]:
        self.notes.append(("wait", num_returns, timeout))
        return [one for one in asked if one.is_ready], [one for one in asked if not one.is_ready]

    def __getattr__(self, name: str) -> Callable[..., object]:
        def note(*arguments: Any, **keywords: object) -> object:
            self.notes.append((name, *arguments, *([keywords] if keywords else [])))
            return arguments[0] if name == "put" else None

        return note


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PlayedRay]:
    """Play a cluster of some devices; a placement group is granted unless `grants` is off."""

    def play(*, grants: bool = True, **resources: float) -> PlayedRay:
        ray = PlayedRay(**resources)

        def placement_group(bundles: list[dict[str, int]], *, strategy: str) -> SimpleNamespace:
            ray.notes.append(("reserve", bundles, strategy))
            return SimpleNamespace(wait=lambda timeout_s: grants and timeout_s == 300.0)

        monkeypatch.setattr(cluster_ray, "ray", ray)
        monkeypatch.setattr(cluster_ray, "waiting", lambda label: ray.waits.append(label) or nullcontext())
        monkeypatch.setattr(cluster_ray, "placement_group", placement_group)
        monkeypatch.setattr(cluster_ray, "remove_placement_group", lambda group: ray.notes.append(("give back", group)))
        return ray

    return play


SEATS = [("10.0.0.2", 0), ("10.0.0.1", 1), ("10.0.0.1", 0), ("10.0.0.0", 2), ("10.0.0.0", 1)]
"""Of the policy on two nodes, and of a critic on a node before those."""


def node_of(address: str) -> str:
    """Return a node's id, which Ray takes in hexadecimal only."""
    return address.encode().hex().ljust(56, "0")


def answers_of(cls: type, number: int) -> dict[str, object]:
    if cls is TrainerActor:
        address, device = SEATS[number]
        return {"seat": Seat(node_id=node_of(address), address=address, device=device)}
    place = EnginePlace(node_id=f"node {number}", address="10.0.0.9", devices=(number,))
    return {"place": place, "prepare": (f"engine {number}", None), "start": "http://e"}


def scheduled_of(actor: PlayedActor) -> tuple[object, ...]:
    strategy = actor.options["scheduling_strategy"]
    place = getattr(strategy, "placement_group_bundle_index", None)
    return place if place is not None else (strategy.node_id, strategy.soft)


@pytest.mark.parametrize("kind", ["GPU", "CPU"])
def test_actors_take_their_bundles_become_ranks_by_node_and_device_and_all_is_given_back(kind, played):
    ray = played(**{"CPU": 9, kind: 9})
    ray.answers = answers_of
    cluster = RayCluster(address=None, environ={"A": "1"})
    ((name, words),) = ray.notes
    assert name == "init" and re.fullmatch("qwench-[0-9a-f]{8}", words.pop("namespace"))
    assert words == {"logging_level": logging.WARNING, "include_dashboard": False}
    assert cluster.has_gpus is (kind == "GPU")

    cluster.reserve(Bundles(trainer=(2, 1), critic=(2,), engines=(2, 1)))
    assert ray.notes[1] == ("reserve", [{"CPU": size, kind: size} for size in (2, 1, 2, 2, 1)], "PACK")
    assert [scheduled_of(actor) for actor in ray.actors] == [0, 0, 1, 2, 2]
    for actor in ray.actors:
        assert (actor.options["cls"], actor.options["groups"]) == (TrainerActor, {"concurrency_groups": {"signs": 1}})
        asked = {name: actor.options[name] for name in ("num_cpus", "num_gpus", "max_concurrency", "runtime_env")}
        gpus = 1 if kind == "GPU" else 0
        environ = {"A": "1", **VISIBLE}
        assert asked == {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 1, "runtime_env": {"env_vars": environ}}

    ranks = cluster.start_ranks()
    in_order = [ray.actors[place] for place in (2, 1, 0, 4, 3)]
    for rank, (actor, device, here) in enumerate(zip(in_order, (0, 1, 0, 1, 2), (2, 2, 1, 2, 2), strict=True)):
        seat, (method, number, environ, options) = actor.calls
        assert (seat, method, number) == (("seat",), "become", rank)
        assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == (str(rank), "5", str(device))
        assert (environ["MASTER_ADDR"], options) == ("127.0.0.1", {"folder": str(Path.cwd()), "ranks_here": here})
    assert ranks.size == 5
    socket.create_connection((environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))).close()  # the ranks' store is kept

    server, other = cluster.make_servers(["make", "other"], sizes=[2, 1])
    engine = ray.actors[5]
    assert (other.label, scheduled_of(ray.actors[6]), ray.actors[6].options["num_cpus"]) == ("engine 1", 4, 1)
    assert (scheduled_of(engine), engine.options["num_cpus"], engine.options["num_gpus"]) == (3, 2, 2 if kind == "GPU" else 0)
    assert (engine.options["cls"], engine.options["max_concurrency"], engine.options["groups"]) == (EngineActor, 4, {})
    assert engine.options["runtime_env"] == {"env_vars": VISIBLE}
    assert (server.label, server.placement) == ("engine 0", None)
    assert engine.calls[1] == ("prepare", "make", answers_of(EngineActor, 0)["place"])
    assert ray.timeouts == [300.0] * 5
    starts = ["start the trainer's actors", "number the trainer's ranks", "start the engines' actors"]
    assert ray.waits == [f"8 {kind}s of the Ray cluster", *starts, *["prepare the engines' actors"] * 2]

    ray.notes.clear()
    cluster.close()
    ended = [("kill", actor) for actor in (*ray.actors[5:], *in_order)]
    assert engine.calls[-1] == ("stop",) and ray.notes[:7] == ended
    assert [note[0] for note in ray.notes[7:]] == ["give back", "shutdown"]
    ranks.end()


def test_engines_beside_the_trainer_run_on_its_nodes_and_threads_are_left_to_who_sets_them(played):
    ray = played(CPU=3, GPU=3)
    ray.answers = answers_of
    cluster = RayCluster(address=None, environ={"OMP_NUM_THREADS": "3"})
    cluster.reserve(Bundles(trainer=(3,), engines=()))
    cluster.start_ranks().end()
    assert all(actor.calls[1][-1]["ranks_here"] is None for actor in ray.actors)
    servers = cluster.make_servers(["a", "b"], sizes=[2, 1])
    assert [scheduled_of(actor) for actor in ray.actors[3:]] == [(node_of("10.0.0.1"), False), (node_of("10.0.0.2"), False)]
    assert [(actor.options["num_cpus"], actor.options["num_gpus"]) for actor in ray.actors[3:]] == [(0, 0)] * 2
    assert [actor.calls[0][1] for actor in ray.actors[3:]] == ["a", "b"] and len(servers) == 2
    assert [actor.calls[0][2].devices for actor in ray.actors[3:]] == [(0, 1), (0,)]


def test_a_cluster_that_is_too_small_or_held_by_others_is_said(played):
    cluster = RayCluster(address=None, environ={}) if played(CPU=8, GPU=2) else None
    needs = "the run needs 3 GPUs .2 for the trainer, 1 for engines apart from it., and the Ray cluster has 2; ask for fewer"
    with pytest.raises(ConfigError, match=needs):
        cluster.reserve(Bundles(trainer=(2,), engines=(1,)))
    played(memory=1)
    with pytest.raises(ConfigError, match="and the Ray cluster has 0; ask for fewer"):
        RayCluster(address=None, environ={}).reserve(Bundles(trainer=(1,), engines=()))
    played(grants=False, CPU=3)
    cluster = RayCluster(address=None, environ={})
    with pytest.raises(TrainingError, match="did not give 3 CPUs within 300 s, in bundles of 2 on one node; another job may"):
        cluster.reserve(Bundles(trainer=(2,), engines=(1,)))
    cluster.close()


@pytest.mark.parametrize("failure", [GetTimeoutError("late"), RayError("gone\nsecond line")])
def test_actors_that_do_not_start_end_the_run(failure, played):
    ray = played(CPU=1)
    ray.answers = lambda _cls, _number: {"seat": failure}
    cluster = RayCluster(address=None, environ={})
    with pytest.raises(TrainingError) as raised:
        cluster.reserve(Bundles(trainer=(1,), engines=()))
    why = "no answer from Ray within 300 s; see ray status." if isinstance(failure, GetTimeoutError) else "gone"
    assert str(raised.value) == f"start the trainer's actors: {why}"
    cluster.close()
    assert ("kill", ray.actors[0]) in ray.notes


def test_ranks_answer_each_call_and_a_lost_one_is_a_death(played):
    ray = played(CPU=1)
    late = Reference(Answer(value=3), is_ready=False)
    lost = RayActorError()
    actors = [PlayedActor({"answer": one, "stacks": "frames"}) for one in (Answer(value=1), lost, late)]
    actors[2] = PlayedActor({"answer": late, "stacks": RayError("gone\nfor good")})
    ranks = RayRanks(actors, rendezvous=None)
    watched = [one for one in processes._processes if one.label.startswith("trainer rank")]
    ranks.send(Call(method="learn"))
    assert [actor.calls for actor in actors] == [[("answer", Call(method="learn"))]] * 3
    first, (rank, death) = ranks.receive(1.5)
    assert (first, rank, death.reason) == ((0, Answer(value=1)), 1, "was lost (RayActorError)")
    assert isinstance(death, Death) and death.output == str(lost).splitlines()[0]
    late.is_ready = True
    assert ranks.receive(0.5) == [(2, Answer(value=3))]
    assert [note for note in ray.notes if note[0] == "wait"] == [("wait", 1, 1.5), ("wait", 1, 0.5)]
    assert [one.label for one in watched] == [f"trainer rank {rank}" for rank in range(3)]
    assert [one.stacks() for one in watched] == ["frames", "frames", "(no answer: gone)"]
    watched[0].silent_s()
    assert actors[0].calls[1:] == [("stacks",), ("beat",)] and ray.timeouts[-3:] == [10.0] * 3
    ranks.end()
    assert ray.notes[-3:] == [("kill", actor) for actor in actors]
    assert not set(watched) & set(processes._processes)


def server_of(**answers: object) -> tuple[RayServer, PlayedActor]:
    placement = Placement(host="a", devices=("gpu",))
    actor = PlayedActor({"prepare": ("engine 0", placement), **answers})
    server = RayServer(actor, "make", EnginePlace(node_id="n", address="a", devices=(0,)))
    assert (server.label, server.placement) == ("engine 0", placement)
    actor.calls.clear()
    return server, actor


def test_a_server_is_launched_once_and_asked_with_deadlines(played):
    ray = played(CPU=1)
    starting = Reference("http://e", is_ready=False)
    server, actor = server_of(start=starting, is_running=1, last_output="words", stacks="frames")
    server.check_start()  # nothing was launched
    server.launch()
    server.check_start()
    assert [note for note in ray.notes if note[0] == "wait"] == [("wait", 1, 0)] and ray.timeouts == [300.0]
    assert (server.start(), actor.calls, ray.timeouts[1:]) == ("http://e", [("start",)], [None])
    assert (server.start(), actor.calls) == ("http://e", [("start",)] * 2), "it is launched again"
    assert (server.is_running(), server.last_output(), server.stacks()) == (True, "words", "frames")
    server.stop()
    assert ray.timeouts[3:] == [60.0, 10.0, 10.0, 60.0]
    server.close()
    assert actor.calls[-1] == ("stop",) and ray.notes[-1] == ("kill", actor)


def test_what_an_engines_actor_raised_is_told_and_a_lost_one_runs_no_more(played):
    ray = played(CPU=1)
    failed = RayError("a traceback")
    failed.cause = EngineError("the server ended with exit code 3.")
    lost = RayActorError()
    server, actor = server_of(start=failed, is_running=lost, last_output=lost, stacks=lost, stop=lost)
    with pytest.raises(EngineError, match=r"^the server ended with exit code 3\.$"):
        server.start()
    server.launch()
    with pytest.raises(EngineError, match="exit code 3"):
        server.check_start()
    gone = f"engine 0: its Ray actor failed ({str(lost).splitlines()[0]})."
    assert (server.is_running(), server.last_output(), server.stacks()) == (False, gone, gone)
    server.close()
    assert ray.notes[-1] == ("kill", actor)


def test_a_cluster_is_reached_at_its_address_or_that_is_said(played, monkeypatch):
    ray, reached, connect = played(CPU=1), [], socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *place, timeout: reached.append(timeout) or connect(*place))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for given in (address, "auto", "local"):
            RayCluster(address=given, environ={})
            name, where, words = ray.notes[-1]
            assert (name, where, words.pop("namespace")[:7]) == ("init", given, "qwench-")
            assert words == {"logging_level": logging.WARNING}
    assert reached == [10.0], "Ray finds the others by itself"
    advice = r"; start one \(ray start --head\), and set RAY_ADDRESS to its host:port, or to auto on one of its nodes"
    for given in (address, "nowhere"):
        with pytest.raises(ConfigError, match=f"there is no Ray cluster at RAY_ADDRESS={given} .*{advice}"):
            RayCluster(address=given, environ={})

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("\nno token\nmore")

    monkeypatch.setattr(ray, "init", refuse, raising=False)
    with pytest.raises(ConfigError, match=r"at RAY_ADDRESS=auto \(no token\); "):
        RayCluster(address="auto", environ={})
