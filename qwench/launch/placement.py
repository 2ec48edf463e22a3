"""Where the learner and the engines of a run live.

launcher   learner                       engines
inside     this process                  this process, or servers of this machine
local      a process for each rank       this process (a CPU that all share), or servers of this machine
ray        an actor for each rank        an actor for each, which owns a server
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, pairwise, starmap
from typing import Literal, Protocol

import torch
from transformers.utils import logging as transformers_logging

from qwench.cluster.bundles import Bundles, plan_bundles
from qwench.cluster.local import LocalRanks
from qwench.cluster.rank_host import BuildLearner
from qwench.cluster.rendezvous import LOOPBACK
from qwench.cluster.workers import Ranks, RemoteLearner, WorkerGroup
from qwench.config.config import Config
from qwench.config.environment import engine_environment, trainer_environment
from qwench.config.plan import RunPlan
from qwench.controller import LearnerProtocol
from qwench.engines.fleet.servers import CommandMaker, Server, ServerProcess
from qwench.errors import ConfigError
from qwench.launch.engines import command_makers
from qwench.launch.inputs import Inputs, read_inputs
from qwench.launch.trainer import build_critic_learner, build_learner
from qwench.observability.log import open_process_log
from qwench.observability.timing import PhaseTimer
from qwench.threads import usable_cores, waiting_defaults
from qwench.training.critic_learner import CriticLearner
from qwench.training.learner import Learner
from qwench.wire.addresses import Placement, gpu_names, host_name

Launcher = Literal["inside", "local", "ray"]


class Processes(Protocol):
    """Starts ranks and servers, and ends them when it is closed."""

    @property
    def has_gpus(self) -> bool:
        """Tell whether the devices of learner and engines are GPUs."""
        ...

    def start_ranks(self) -> Ranks | None:
        """Start the trainer's ranks; None: the learner is in this process."""
        ...

    def make_servers(self, makers: Sequence[CommandMaker], *, sizes: Sequence[int]) -> Sequence[Server]:
        """Return a server for each maker, not started yet."""
        ...


class LocalProcesses:
    """Everything on this machine; trainer ranks have its first GPUs, a critic's own and then engines apart the next ones."""

    def __init__(self, inputs: Inputs, bundles: Bundles, *, ranks_inside: bool) -> None:
        self._has_gpus = torch.cuda.is_available()
        self._inputs = inputs
        self._bundles = bundles
        self._ranks_inside = ranks_inside

    def start_ranks(self) -> Ranks | None:
        """See `Processes.start_ranks`."""
        if self._ranks_inside:
            return None
        config, log_dir = self._inputs.config, self._inputs.plan.log_dir
        return LocalRanks(
            config.num_ranks,
            environ={**os.environ, **trainer_environment(config, os.environ)},
            bucket_bytes=config.engine.update_weight_buffer_size,
            log_folder=log_dir / "ranks" if log_dir is not None else None,
        )

    def make_servers(self, makers: Sequence[CommandMaker], *, sizes: Sequence[int]) -> Sequence[Server]:
        """See `Processes.make_servers`."""
        first = sum(self._bundles.trained) if self._bundles.engines else 0
        ranges = starmap(range, pairwise(accumulate(sizes, initial=first)))
        return [self._server(make, devices) for make, devices in zip(makers, ranges, strict=True)]

    @property
    def has_gpus(self) -> bool:
        """Tell whether this machine has GPUs."""
        return self._has_gpus

    def _server(self, make: CommandMaker, devices: Sequence[int]) -> Server:
        gpu_ids = list(devices) if self.has_gpus else []
        placement = Placement(host=host_name(), devices=gpu_names(gpu_ids)) if gpu_ids else None
        config = self._inputs.config
        trainers = trainer_environment(config, {})
        environ = engine_environment(os.environ, trainers)
        if not gpu_ids:  # the servers share this machine's cores
            environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // self._inputs.plan.devices.num_engines)))
        return ServerProcess(make(gpu_ids=gpu_ids, environ=environ, host=LOOPBACK), placement=placement)


def open_processes(inputs: Inputs, started: ExitStack) -> Processes:
    """Choose the launcher, and reserve what the run needs; `started` gets what gives it back.

    Raises:
        ConfigError: there is no cluster, or it has too few devices.
    """
    config, devices = inputs.config, inputs.plan.devices
    launcher = choose_launcher(config, os.environ, generates=devices.generates)
    bundles = plan_bundles(config.cluster, devices)
    if launcher != "ray":
        return LocalProcesses(inputs, bundles, ranks_inside=launcher == "inside")
    from qwench.cluster.ray import RayCluster  # noqa: PLC0415  # Ray is optional

    environ = {**waiting_defaults({}), **trainer_environment(config, {})}
    with inputs.console.phase("start actors"):
        cluster = RayCluster(
            address=os.environ.get("RAY_ADDRESS"), environ={name: os.environ.get(name, text) for name, text in environ.items()}
        )
        started.callback(cluster.close)
        cluster.reserve(bundles)
    check_turns(config, on_gpus=cluster.has_gpus)
    return cluster


def enough_gpus(inputs: Inputs) -> None:
    """Check that this machine has the GPUs that the run asks for; on CPUs, ranks share the cores.

    Raises:
        ConfigError: there are too few.
    """
    bundles, there = plan_bundles(inputs.config.cluster, inputs.plan.devices), torch.cuda.device_count()
    if torch.cuda.is_available() and there < bundles.num_devices:
        raise ConfigError(
            f"the run needs {bundles.num_devices} GPUs ({bundles.words}), and this machine has {there}; ask for fewer, "
            "or use a Ray cluster (--launcher ray)."
        )


def check_turns(config: Config, *, on_gpus: bool) -> None:
    """Refuse a colocated run on GPUs that generates ahead: trainer and engines cannot take turns and work at the same time.

    Raises:
        ConfigError: --colocate and --rollouts-ahead 1 or --fully-async exclude each other.
    """
    if on_gpus and config.cluster.colocate and config.generates_ahead:
        flag = "--fully-async" if config.asynchronous.fully_async else "--rollouts-ahead 1"
        raise ConfigError(
            f"--colocate lets trainer and engines take turns on the same GPUs, and {flag} has them work at the same "
            "time; leave one of them out (--rollout-num-gpus gives the engines other GPUs)."
        )


def choose_launcher(config: Config, environ: Mapping[str, str], *, generates: bool) -> Launcher:
    """Return what --launcher means here; ranks that torchrun started are one process each already.

    Raises:
        ConfigError: torchrun started ranks that would each generate, or others than the flags ask for.
    """
    cluster, started = config.cluster, int(environ.get("WORLD_SIZE", "1"))
    if started > 1 and generates:
        raise ConfigError("qwench starts trainer ranks and engines itself; start it once, without torchrun.")
    if started > 1 and config.critic_gpus:
        raise ConfigError("--critic-num-gpus-per-node needs ranks that qwench starts itself; leave torchrun out.")
    if started > 1 and started != cluster.world_size:
        raise ConfigError(
            f"torchrun started {started} ranks, and --actor-num-nodes x --actor-num-gpus-per-node asks for "
            f"{cluster.world_size}; make them equal, or leave torchrun out."
        )
    if started > 1:
        return "inside"
    if cluster.launcher != "auto":
        return cluster.launcher
    if max(cluster.actor_num_nodes, len(config.critic_gpus)) > 1:
        return "ray"
    apart = generates and not cluster.shares_devices
    if "RAY_ADDRESS" in environ and (config.num_ranks > 1 or apart):
        return "ray"
    return "local" if config.num_ranks > 1 else "inside"


def make_servers(inputs: Inputs, processes: Processes, *, with_weights: bool) -> tuple[Sequence[Server] | None, str | None]:
    """Return the engines' servers and the token that they ask for; None: one embedded engine in this process is enough.

    Args:
        with_weights: the engines sample with the checkpoint's weights; else only after the first publication.
    """
    config, devices = inputs.config, inputs.plan.devices
    if config.engine.rollout_external_engine_addrs:
        return None, None
    in_here = isinstance(processes, LocalProcesses) and config.cluster.shares_devices
    enough = (config.num_ranks == 1 or not processes.has_gpus) and max(devices.engine_sizes, default=1) == 1
    if in_here and enough and config.engine.facts.runs_in_process:
        return None, None
    token = secrets.token_hex()
    makers = command_makers(
        inputs, num_engines=devices.num_engines, token=token, with_weights=with_weights, on_gpus=processes.has_gpus
    )
    return processes.make_servers(makers, sizes=devices.engine_sizes), token


def take_turns(config: Config, processes: Processes, servers: Sequence[Server] | None) -> bool:
    """Tell whether learner and engines use the same devices by turns; the memory of a CPU is enough for both at once."""
    if config.engine.rollout_external_engine_addrs or not config.cluster.shares_devices:
        return False
    return processes.has_gpus or servers is not None


def start_ranks(processes: Processes, started: ExitStack) -> Ranks | None:
    """Start the trainer's ranks, which import libraries while engines start; None: the learner is in this process."""
    ranks = processes.start_ranks()
    if ranks is not None:
        started.callback(ranks.end)
    return ranks


def start_learner(
    inputs: Inputs, ranks: Ranks | None, timer: PhaseTimer, started: ExitStack, *, loading: Sequence[Server] = ()
) -> LearnerProtocol:
    """Build the learner on its ranks, or in this process; `started` gets what closes it.

    Args:
        loading: servers that start at the same time. The end of one ends the wait for the ranks.
    """
    with timer.phase("trainer"):
        if ranks is None:
            learner = build_learner(inputs, timer)
            started.callback(learner.state.close)
            return learner
        group = WorkerGroup(ranks)
        started.callback(group.close)
        build: BuildLearner = partial(build_rank, inputs.config, inputs.plan)
        unit = "batch" if inputs.plan.fine_tunes else "rollout"

        def check() -> None:
            for server in loading:
                server.check_start()

        return RemoteLearner(
            group,
            build,
            console=inputs.console,
            timeouts=inputs.config.timeouts,
            unit=unit,
            check=check,
            first_critic_rank=inputs.config.cluster.world_size if inputs.plan.devices.critic else None,
        )


def start_beside(
    inputs: Inputs, servers: Sequence[Server], ranks: Ranks | None, timer: PhaseTimer, started: ExitStack, ending: ExitStack
) -> LearnerProtocol | None:
    """Launch servers that have devices of their own, and build the learner while they load.

    Args:
        started: gets what ends the servers.
        ending: gets what closes the learner.

    Returns:
        None: learner and engines take turns, or the run has no learner.
    """
    if inputs.config.cluster.shares_devices or not inputs.plan.devices.trains:
        return None
    for server in servers:
        started.callback(server.stop)
        server.launch()
    return start_learner(inputs, ranks, timer, ending, loading=servers)


def build_rank(config: Config, plan: RunPlan, timer: PhaseTimer) -> Learner | CriticLearner:
    """Build the learner of one rank, of the policy or of a critic, in its own process, from the driver's configuration."""
    transformers_logging.disable_progress_bar()
    inputs = read_inputs(config, plan)
    open_process_log(config.logging.log_level, f"rank {inputs.rank}", to_stdout=inputs.is_main)
    is_policy = inputs.rank < config.cluster.world_size
    return build_learner(inputs, timer) if is_policy else build_critic_learner(inputs, timer)
