"""Where the learner of a run lives: in this process, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Literal

import torch
from transformers.utils import logging as transformers_logging

from qwench.cluster.local import LocalRanks
from qwench.cluster.workers import RemoteLearner, WorkerGroup
from qwench.config import Config
from qwench.config.environment import trainer_environment
from qwench.controller import Learns
from qwench.errors import ConfigError
from qwench.launch.inputs import Inputs, read_inputs
from qwench.launch.trainer import build_learner
from qwench.observability.timing import PhaseTimer
from qwench.training.learner import Learner

Launcher = Literal["inside", "local", "ray"]


def choose_launcher(config: Config, environ: Mapping[str, str]) -> Launcher:
    """Return what --launcher means here; ranks that torchrun started are one process each already.

    Raises:
        ConfigError: torchrun started other ranks than the flags ask for.
    """
    cluster, started = config.cluster, int(environ.get("WORLD_SIZE", "1"))
    if started > 1:
        if started != cluster.world_size:
            raise ConfigError(
                f"torchrun started {started} ranks, and --actor-num-nodes x --actor-num-gpus-per-node asks for "
                f"{cluster.world_size}; make them equal, or leave torchrun out."
            )
        return "inside"
    if cluster.launcher != "auto":
        return cluster.launcher
    if cluster.world_size == 1:
        return "inside"
    return "ray" if "RAY_ADDRESS" in environ or cluster.actor_num_nodes > 1 else "local"


def start_learner(inputs: Inputs, timer: PhaseTimer, started: ExitStack, *, num_rollout: int) -> Learns:
    """Build the learner where --launcher says; `started` gets what ends its processes."""
    launcher = choose_launcher(inputs.config, os.environ)
    if launcher == "inside":
        return build_learner(inputs, timer, num_rollout=num_rollout)
    group = WorkerGroup(_local_ranks(inputs))
    started.callback(group.close)
    return RemoteLearner(group, partial(build_rank, inputs.config, num_rollout), console=inputs.console)


def build_rank(config: Config, num_rollout: int, timer: PhaseTimer) -> Learner:
    """Build the learner of one rank, in its own process, from the configuration that the driver was given."""
    transformers_logging.disable_progress_bar()
    return build_learner(read_inputs(config), timer, num_rollout=num_rollout)


def _local_ranks(inputs: Inputs) -> LocalRanks:
    config, size = inputs.config, inputs.config.cluster.world_size
    if torch.cuda.is_available() and torch.cuda.device_count() < size:
        raise ConfigError(
            f"the run needs {size} GPUs for its trainer ranks, and this machine has {torch.cuda.device_count()}; lower "
            "--actor-num-gpus-per-node."
        )
    log_dir = inputs.resolved.log_dir
    return LocalRanks(
        size,
        environ={**os.environ, **trainer_environment(config.cluster, config.training, os.environ)},
        bucket_bytes=config.engine.update_weight_buffer_size,
        log_folder=log_dir / "logs" if log_dir is not None else None,
        say=inputs.console.say,
    )
