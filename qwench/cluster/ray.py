"""Trainer ranks and engine servers on a Ray cluster, of GPUs or, where it has none, of CPUs.

    connect -> reserve bundles -> one TrainerActor on each trainer device, ordered by node and device -> ranks
                               -> one EngineActor for each engine, which owns its server process      -> servers
    close: engines stop, actors end, the reservation is given back; a cluster that was here before stays

Actors end with the driver, and servers with their actor.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from qwench.cluster.bundles import Bundles, EnginePlace, Seat, engine_places, order_of
from qwench.cluster.messages import Call, Death, RankReply
from qwench.cluster.ray_actors import SIGNS, EngineActor, TrainerActor
from qwench.cluster.rendezvous import Rendezvous
from qwench.engines.fleet.servers import CommandMaker
from qwench.errors import ConfigError, EngineError, TrainingError
from qwench.observability.processes import AskedProcess, forget, register
from qwench.observability.waiting import waiting
from qwench.wire.addresses import Placement

CONNECT_TIMEOUT_S = 10.0
RESERVE_TIMEOUT_S = 300.0
ACTOR_TIMEOUT_S = 300.0
CONTROL_TIMEOUT_S = 60.0
TOLD_TIMEOUT_S = 10.0
_ENGINE_THREADS = 4  # an engine that starts can still be asked whether it runs
_ALL_DEVICES_VISIBLE = {
    # So that a device has the same number in every process of a node.
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES": "1",
}

Actor = Any
"""Ray's handles have no types of use."""


class RayCluster:
    """See the module docstring. Its creator closes it."""

    def __init__(self, *, address: str | None, environ: Mapping[str, str]) -> None:
        """Connect.

        Args:
            address: of the cluster; None: the one that runs on this machine, else one is started, and ends with `close`.
            environ: variables for the trainer's actors, besides those of their nodes.

        Raises:
            ConfigError: there is no cluster at the address.
        """
        _connect(address)
        self._trainer_environ = dict(environ)
        self._kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        self._bundles = Bundles(trainer=(), engines=())
        self._group: PlacementGroup | None = None
        self._trainers: list[Actor] = []
        self._seats: list[Seat] = []
        self._servers: list[RayServer] = []

    @property
    def has_gpus(self) -> bool:
        """Tell whether the cluster's devices are GPUs."""
        return self._kind == "GPU"

    def reserve(self, bundles: Bundles) -> None:
        """Take devices for the whole run, and put an actor on each of the trainer's.

        Raises:
            ConfigError: the cluster is too small.
            TrainingError: others hold what is needed, or actors do not start.
        """
        self._bundles = bundles
        there = int(ray.cluster_resources().get(self._kind, 0))
        if there < bundles.num_devices:
            raise ConfigError(
                f"the run needs {bundles.num_devices} {self._kind}s ({bundles.words}), and the Ray cluster has {there}; "
                "ask for fewer."
            )
        sizes = (*bundles.trained, *bundles.engines)
        self._group = placement_group([{"CPU": size, self._kind: size} for size in sizes], strategy="PACK")
        with waiting(f"{bundles.num_devices} {self._kind}s of the Ray cluster"):
            is_reserved = self._group.wait(RESERVE_TIMEOUT_S)
        if not is_reserved:
            raise TrainingError(
                f"the Ray cluster did not give {bundles.num_devices} {self._kind}s within {RESERVE_TIMEOUT_S:g} s, in bundles "
                f"of {max(sizes)} on one node; another job may hold them (see ray status)."
            )
        trainers = [
            self._start_on_bundle(TrainerActor, index, num_devices=1)
            for index, size in enumerate(bundles.trained)
            for _ in range(size)
        ]
        self._trainers = trainers
        seats: list[Seat] = _all([actor.seat.remote() for actor in trainers], label="start the trainer's actors")
        num_policy = sum(bundles.trainer)  # its ranks come first, also where the critic's node has a lower address
        order = [*order_of(seats[:num_policy]), *(num_policy + place for place in order_of(seats[num_policy:]))]
        self._trainers, self._seats = [trainers[i] for i in order], [seats[i] for i in order]

    def start_ranks(self) -> RayRanks:
        """Make the trainer's actors ranks, in order of node and device."""
        rendezvous, size = Rendezvous(ray.util.get_node_ip_address()), len(self._trainers)
        on_node = Counter(seat.node_id for seat in self._seats)
        own_threads = "OMP_NUM_THREADS" not in self._trainer_environ
        numbered = [
            actor.become.remote(
                rank,
                rendezvous.environ(rank, size, local_rank=seat.device),
                folder=str(Path.cwd()),
                ranks_here=on_node[seat.node_id] if own_threads else None,
            )
            for rank, (actor, seat) in enumerate(zip(self._trainers, self._seats, strict=True))
        ]
        _all(numbered, label="number the trainer's ranks")
        return RayRanks(self._trainers, rendezvous)

    def make_servers(self, makers: Sequence[CommandMaker], *, sizes: Sequence[int]) -> list[RayServer]:
        """Return a server for each maker, not started yet: on separate devices, or on the trainer's in order of ranks."""
        if self._bundles.engines:
            first = len(self._bundles.trained)
            actors = [
                self._start_on_bundle(EngineActor, first + i, num_devices=size) for i, size in enumerate(self._bundles.engines)
            ]
            places: list[EnginePlace] = _all([actor.place.remote() for actor in actors], label="start the engines' actors")
        else:
            places = engine_places(self._seats, sizes=sizes, with_numbers=self.has_gpus)
            actors = [self._start_beside_trainer(place) for place in places]
        self._servers = [RayServer(*each) for each in zip(actors, makers, places, strict=True)]
        return self._servers

    def close(self) -> None:
        """End what was started, and nothing else."""
        for server in self._servers:
            server.close()
        for actor in self._trainers:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
        ray.shutdown()  # ends the cluster only if it began with this object

    def _start_on_bundle(self, cls: type, index: int, *, num_devices: int) -> Actor:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)  # type: ignore[arg-type]  # reserved
        return self._start(cls, strategy, num_cpus=num_devices, num_gpus=num_devices if self.has_gpus else 0)

    def _start_beside_trainer(self, place: EnginePlace) -> Actor:
        """Start an engine's actor on devices that the trainer's bundles reserved."""
        return self._start(EngineActor, NodeAffinitySchedulingStrategy(place.node_id, soft=False), num_cpus=0, num_gpus=0)

    def _start(self, cls: type, strategy: Any, *, num_cpus: int, num_gpus: int) -> Actor:
        environ = {**(self._trainer_environ if cls is TrainerActor else {}), **_ALL_DEVICES_VISIBLE}
        options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": environ}}
        threads = _ENGINE_THREADS if cls is EngineActor else 1
        # Any: Ray's overloads do not know this option.
        with_signs: Any = ray.remote
        remote: Any = with_signs(concurrency_groups={SIGNS: 1})(cls) if cls is TrainerActor else ray.remote(cls)
        return remote.options(scheduling_strategy=strategy, max_concurrency=threads, **options).remote()


class RayRanks:
    """See `workers.Ranks`."""

    def __init__(self, actors: Sequence[Actor], rendezvous: Rendezvous) -> None:
        """Take over numbered actors; the rendezvous is kept as long as they may need it."""
        self._actors = list(actors)
        self._rendezvous = rendezvous
        self._pending: dict[ray.ObjectRef[RankReply], int] = {}
        self._watched = [_watched_actor(actor, rank) for rank, actor in enumerate(self._actors)]
        for process in self._watched:
            register(process)

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return len(self._actors)

    def send(self, call: Call) -> None:
        """Give every rank the call, through the object store; see `Ranks.send`."""
        shared = ray.put(call)
        self._pending = {actor.answer.remote(shared): rank for rank, actor in enumerate(self._actors)}

    def receive(self, timeout_s: float) -> list[tuple[int, RankReply]]:
        """Return answers and deaths; see `Ranks.receive`."""
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        return [(self._pending.pop(answer), _reply(answer)) for answer in ready]

    def end(self) -> None:
        """End every actor; see `Ranks.end`."""
        for process in self._watched:
            forget(process)
        for actor in self._actors:
            ray.kill(actor)


class RayServer:
    """An engine's server on its node; see `engines.fleet.servers.Server`."""

    def __init__(self, actor: Actor, make: CommandMaker, place: EnginePlace) -> None:
        self._actor = actor
        self._label, self._placement = _all([actor.prepare.remote(make, place)], label="prepare the engines' actors")[0]
        self._launched: ray.ObjectRef[str] | None = None

    @property
    def label(self) -> str:
        """See `Server.label`."""
        return str(self._label)

    @property
    def placement(self) -> Placement | None:
        """See `Server.placement`."""
        placement: Placement | None = self._placement
        return placement

    def launch(self) -> None:
        """See `Server.launch`."""
        self._launched = self._actor.start.remote()

    def check_start(self) -> None:
        """See `Server.check_start`."""
        if self._launched is not None and ray.wait([self._launched], timeout=0)[0]:
            self._answer(self._launched, timeout_s=None)

    def start(self) -> str:
        """See `Server.start`."""
        launched, self._launched = self._launched, None
        return str(self._answer(launched or self._actor.start.remote(), timeout_s=None))  # the server has its own deadline

    def stop(self) -> None:
        """See `Server.stop`."""
        self._ask(self._actor.stop, timeout_s=CONTROL_TIMEOUT_S)

    def is_running(self) -> bool:
        """See `Server.is_running`; no more once its node or its actor is gone."""
        try:
            return bool(self._ask(self._actor.is_running, timeout_s=CONTROL_TIMEOUT_S))
        except EngineError:
            return False

    def last_output(self) -> str:
        """See `Server.last_output`."""
        return self._told(self._actor.last_output)

    def stacks(self) -> str:
        """See `Server.stacks`."""
        return self._told(self._actor.stacks)

    def close(self) -> None:
        """End the server, then its actor."""
        with suppress(EngineError):  # where actor or node are gone, the server is
            self.stop()
        ray.kill(self._actor)

    def _told(self, method: Actor) -> str:
        """Return what the actor says, or why it says nothing."""
        try:
            return str(self._ask(method, timeout_s=TOLD_TIMEOUT_S))
        except EngineError as error:
            return str(error)

    def _ask(self, method: Actor, *, timeout_s: float | None) -> Any:
        return self._answer(method.remote(), timeout_s=timeout_s)

    def _answer(self, asked: ray.ObjectRef[Any], *, timeout_s: float | None) -> Any:
        try:
            return ray.get(asked, timeout=timeout_s)
        except RayError as cause:
            failure = getattr(cause, "cause", None)  # what the actor's method raised
            if isinstance(failure, EngineError):
                raise failure from cause
            raise EngineError(f"{self._label}: its Ray actor failed ({_first_line(cause)}).") from cause


def _watched_actor(actor: Actor, rank: int) -> AskedProcess:
    def stacks() -> str:
        try:
            return str(ray.get(actor.stacks.remote(), timeout=TOLD_TIMEOUT_S))
        except RayError as error:
            return f"(no answer: {_first_line(error)})"

    return AskedProcess(f"trainer rank {rank}", lambda: actor.beat.remote().future(), stacks)


def _connect(address: str | None) -> None:
    namespace = f"qwench-{secrets.token_hex(4)}"
    if address is None:
        # Options of a new cluster have no effect on one that runs already.
        ray.init(namespace=namespace, logging_level=logging.WARNING, include_dashboard=False)
        return
    advice = (
        "start one (ray start --head), and set RAY_ADDRESS to its host:port, or to auto on one of its nodes; if it asks for a "
        "token, set RAY_AUTH_MODE=token too"
    )
    try:
        if address not in ("auto", "local"):
            host, _, port = address.rpartition(":")
            # Ray itself waits for minutes where no cluster listens.
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address, namespace=namespace, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as cause:
        raise ConfigError(f"there is no Ray cluster at RAY_ADDRESS={address} ({_first_line(cause)}); {advice}.") from cause


def _all(references: Sequence[ray.ObjectRef[Any]], *, label: str) -> list[Any]:
    try:
        with waiting(label):
            answers: list[Any] = ray.get(list(references), timeout=ACTOR_TIMEOUT_S)
    except GetTimeoutError as cause:
        raise TrainingError(f"{label}: no answer from Ray within {ACTOR_TIMEOUT_S:g} s; see ray status.") from cause
    except RayError as cause:
        raise TrainingError(f"{label}: {_first_line(cause)}") from cause
    return answers


def _reply(answer: ray.ObjectRef[RankReply]) -> RankReply:
    try:
        reply: RankReply = ray.get(answer)
    except RayError as error:
        return Death(reason=f"was lost ({type(error).__name__})", output=_first_line(error))
    return reply


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
