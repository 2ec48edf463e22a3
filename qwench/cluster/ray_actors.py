"""What runs on the nodes of a Ray cluster: actors that are trainer ranks, and actors that own an engine's server process."""

from __future__ import annotations

import faulthandler
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import ray
import torch

from qwench.cluster.bundles import EnginePlace, Seat, device_number
from qwench.cluster.messages import Answer, Call, Failure
from qwench.cluster.rank_host import RankHost
from qwench.engines.fleet.servers import CommandMaker, ServerProcess
from qwench.threads import usable_cores
from qwench.wire.addresses import Placement, gpu_names, host_name

SIGNS = "signs"
"""Ray's name for the thread of an actor that answers during a call."""


class TrainerActor:
    """One trainer rank; see `RankHost`."""

    def seat(self) -> Seat:
        """Say where this is."""
        node_id = ray.get_runtime_context().get_node_id()
        return Seat(node_id=node_id, address=ray.util.get_node_ip_address(), device=(_granted() or [0])[0])

    def become(self, rank: int, environ: Mapping[str, str], *, folder: str, ranks_here: int | None) -> None:
        """Take the place of a rank.

        Args:
            environ: says how to find the others.
            folder: that the driver runs in: relative paths mean the same here, where it exists.
            ranks_here: that share this node's cores: Ray tells every actor to use one. None: leave the threads as they are.
        """
        os.environ.update(environ)
        if ranks_here is not None:
            torch.set_num_threads(max(1, usable_cores() // ranks_here))
        if Path(folder).is_dir():
            os.chdir(folder)
        self._host = RankHost(rank, exchange_folder=None)

    def answer(self, call: Call) -> Answer | Failure:
        """See `RankHost.answer`."""
        return self._host.answer(call)

    @ray.method(concurrency_group=SIGNS)
    def beat(self) -> None:
        """Give a sign of life, also during a call."""

    @ray.method(concurrency_group=SIGNS)
    def stacks(self) -> str:
        """Return the stacks of this process, also during a call."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            return file.read()


class EngineActor:
    """Owns one engine's server process, which ends with this actor. Several methods may run at a time."""

    def __init__(self) -> None:
        self._server: ServerProcess | None = None

    def place(self) -> EnginePlace:
        """Say where this is."""
        node_id = ray.get_runtime_context().get_node_id()
        return EnginePlace(node_id=node_id, address=ray.util.get_node_ip_address(), devices=tuple(_granted()))

    def prepare(self, make: CommandMaker, place: EnginePlace) -> tuple[str, Placement | None]:
        """Make the server's command for this node, and return its label and, on GPUs, where its weights will lie."""
        command = make(gpu_ids=place.devices, environ=dict(os.environ), host=place.address)
        placement = Placement(host=host_name(), devices=gpu_names(place.devices)) if place.devices else None
        self._server = ServerProcess(command, placement=placement)
        return command.label, placement

    def start(self) -> str:
        """See `Server.start`."""
        return self._held.start()

    def stop(self) -> None:
        """See `Server.stop`."""
        self._held.stop()

    def is_running(self) -> bool:
        """See `Server.is_running`."""
        return self._held.is_running()

    def last_output(self) -> str:
        """See `Server.last_output`."""
        return self._held.last_output()

    def stacks(self) -> str:
        """See `Server.stacks`."""
        return self._held.stacks()

    @property
    def _held(self) -> ServerProcess:
        assert self._server is not None, "prepare comes first"
        return self._server


def _granted() -> list[int]:
    """Return the numbers of the GPUs that Ray gave this actor, among those that the node's processes see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("HIP_VISIBLE_DEVICES")
    return [device_number(str(granted), visible) for granted in ray.get_gpu_ids()]
