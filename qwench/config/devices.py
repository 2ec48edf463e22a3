"""Devices of a run: those of the trainer, and those of each engine, equally many or by the file of --sglang-config.

    sglang:
    - name: default
      server_groups:
      - {worker_type: regular, num_gpus: 4, num_gpus_per_engine: 2}      two engines of 2 GPUs
      - {worker_type: regular, num_gpus: 1, num_gpus_per_engine: 1}      one of 1
      - {worker_type: placeholder, num_gpus: 1}                          one GPU that no engine uses

Source: slime's format of the same flag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import yaml

from qwench.config.config import Config
from qwench.config.yaml_file import read_yaml_file
from qwench.errors import ConfigError
from qwench.models.architecture import Architecture

_GROUP_KEYS = frozenset({"worker_type", "num_gpus", "num_gpus_per_engine"})


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePlan:
    """Devices of the trainer, of a critic apart from it, and of the engines."""

    trains: bool
    generates: bool
    on_gpus: bool
    """The trainer computes on GPUs."""
    shared: bool
    """Trainer and engines use the same devices. False also where one of them is missing."""
    engine_sizes: tuple[int, ...]
    """Devices of each engine that the run starts; empty: none, or those of --rollout-external-engine-addrs."""
    critic: tuple[int, ...] = ()
    """Devices of the critic's own on each of its nodes; empty: it shares the policy's, or there is none."""
    num_eval_engines: int = 0
    """Engines at the end of these that serve evaluations alone."""
    offload_train: bool
    offload_rollout: bool
    weights_may_alias: bool
    """An engine in this process may sample from the trainer's own tensors: it never generates while they change."""

    @property
    def num_engines(self) -> int:
        """Return how many engines the run starts."""
        return len(self.engine_sizes)


def plan_devices(config: Config, *, trains: bool, on_gpus: bool) -> DevicePlan:
    """Divide the devices between trainer and engines.

    Raises:
        ConfigError: an engine would span two nodes.
    """
    cluster, debug, rollout = config.cluster, config.debug, config.rollout
    generates = config.generates
    per_engine = cluster.rollout_num_gpus_per_engine
    num_devices = cluster.world_size if cluster.shares_devices else (cluster.rollout_num_gpus or 0)
    num_devices += config.evaluation.eval_num_gpus
    starts_engines = generates and not config.engine.rollout_external_engine_addrs
    shared = generates and trains and not debug.debug_rollout_only and cluster.shares_devices
    if shared and starts_engines and cluster.actor_num_gpus_per_node % per_engine:
        raise ConfigError(
            f"--rollout-num-gpus-per-engine {per_engine} does not divide --actor-num-gpus-per-node "
            f"{cluster.actor_num_gpus_per_node}, and an engine lives on one node; choose a divisor."
        )
    return DevicePlan(
        trains=trains and not debug.debug_rollout_only,
        generates=generates,
        on_gpus=on_gpus,
        shared=shared,
        critic=config.critic_gpus if trains and not debug.debug_rollout_only else (),
        engine_sizes=(sizes := _engine_sizes(config, num_devices) if starts_engines else ()),
        num_eval_engines=_num_eval_engines(sizes, config.evaluation.eval_num_gpus),
        offload_train=_offloads(cluster.offload_train, cluster.offload, cluster.shares_devices),
        offload_rollout=_offloads(cluster.offload_rollout, cluster.offload, cluster.shares_devices),
        weights_may_alias=generates and not config.generates_ahead and rollout.update_weights_interval == 1,
    )


def _num_eval_engines(sizes: Sequence[int], num_gpus: int) -> int:
    """Return how many engines at the end of `sizes` have the GPUs of --eval-num-gpus.

    Raises:
        ConfigError: no whole engines have as many, or no engine is left for rollouts.
    """
    sums = [0, *accumulate(reversed(sizes))]
    if sizes and num_gpus not in sums[:-1]:
        raise ConfigError(
            f"--eval-num-gpus {num_gpus} must be the GPUs of the last engines, which have "
            f"{', '.join(map(str, sizes))}; see --rollout-num-gpus-per-engine and --sglang-config"
        )
    return sums.index(num_gpus) if sizes else 0


def _offloads(asked: bool | None, both: bool, shares_devices: bool) -> bool:
    return both or (shares_devices if asked is None else asked)


def _engine_sizes(config: Config, num_devices: int) -> tuple[int, ...]:
    """Return the devices of each engine, in the order of their devices.

    Raises:
        ConfigError: --sglang-config does not fit the devices, or an engine of it would span two nodes.
    """
    path, cluster = config.engine.sglang_config, config.cluster
    per_engine = cluster.rollout_num_gpus_per_engine
    if path is None or config.engine.facts.reads_embedded_flags:
        return (per_engine,) * (num_devices // per_engine)
    sizes = read_engine_sizes(path, num_gpus=num_devices, default_size=per_engine)
    node = cluster.actor_num_gpus_per_node if cluster.shares_devices else cluster.num_gpus_per_node
    for first, end in pairwise(accumulate(sizes, initial=0)):
        if first // node != (end - 1) // node:
            raise ConfigError(
                f"--sglang-config: {path}: an engine of {end - first} GPUs would span nodes of {node}; reorder the groups."
            )
    return sizes


def divides_models(config: Config) -> bool:
    """Tell whether the run starts embedded engines of several GPUs."""
    is_own = config.engine.facts.reads_embedded_flags and not config.engine.rollout_external_engine_addrs
    return is_own and config.cluster.rollout_num_gpus_per_engine > 1


def check_division(config: Config, model: Architecture) -> None:
    """Check that embedded engines of several GPUs can divide the model and have all that the run asks for.

    Raises:
        ConfigError: they cannot, or have not.
    """
    if not divides_models(config):
        return
    size = config.cluster.rollout_num_gpus_per_engine
    model.divided(size)
    asked = {
        "--deterministic-mode": config.training.deterministic_mode,
        "--lora-publish adapter": config.lora.lora_publish == "adapter",
    }
    for flag, is_given in asked.items():
        if is_given:
            raise ConfigError(f"{flag} needs embedded engines of one GPU, got --rollout-num-gpus-per-engine {size}")


def read_engine_sizes(path: Path, *, num_gpus: int, default_size: int) -> tuple[int, ...]:
    """Return the GPUs of each engine, in the order of the file.

    Args:
        num_gpus: GPUs for engines; the groups must name as many.
        default_size: --rollout-num-gpus-per-engine, for groups that do not say.

    Raises:
        ConfigError: the file cannot be read, or describes engines that are not served.
    """
    try:
        content = read_yaml_file(path)
        groups = _groups(content)
        sizes = [size for group in groups for size in _sizes(group, default_size)]
        named = sum(int(group["num_gpus"]) for group in groups)
    except OSError as error:
        raise ConfigError(f"--sglang-config: cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--sglang-config: {path} is not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--sglang-config: {path}: {error}") from error
    if named != num_gpus:
        raise ConfigError(f"--sglang-config: {path} names {named} GPUs, and the engines of this run have {num_gpus}")
    return tuple(sizes)


def _groups(content: Any) -> list[Mapping[str, Any]]:  # Any: YAML
    models = content["sglang"] if isinstance(content, dict) and "sglang" in content else None
    if not isinstance(models, list) or not models:
        raise ValueError("the file must map sglang to a list of models")
    for model in models[1:]:
        raise ValueError(f"a second model ({model.get('name')}) is not served; all engines serve the policy")
    (model,) = models
    if not model.get("update_weights", True):
        raise ValueError("update_weights false is not supported: engines serve the policy")
    groups: list[Mapping[str, Any]] = model.get("server_groups") or []
    types = [group.get("worker_type", "regular") for group in groups]
    if "placeholder" in types[: len(types) - types[::-1].index("regular")] if "regular" in types else not types:
        raise ValueError("groups of worker_type placeholder must come last")
    return groups


def _sizes(group: Mapping[str, Any], default_size: int) -> Iterator[int]:
    kind = group.get("worker_type", "regular")
    if kind == "placeholder":
        return
    if kind != "regular":
        raise ValueError(f"worker_type {kind} is not supported: every engine prefills and decodes")
    if more := sorted(set(group) - _GROUP_KEYS):
        raise ValueError(f"a group has the unknown key {more[0]!r}; known: {', '.join(sorted(_GROUP_KEYS))}")
    size = int(group.get("num_gpus_per_engine", default_size))
    count, left = divmod(int(group["num_gpus"]), size)
    if left:
        raise ValueError(f"num_gpus_per_engine {size} does not divide num_gpus {group['num_gpus']}")
    yield from (size,) * count
