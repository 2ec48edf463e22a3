"""Which engine a command line means by `--rollout-engine auto`, and the rules between engines and other flags.

Scripts of slime and miles name no engine and mean SGLang. The embedded engine generates on a CPU and on one GPU; on several
GPUs a start without SGLang is refused, for a run there must not change its engine unseen.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qwench.config.config import Config
from qwench.config.sglang_flags import unknown_sglang_flag
from qwench.errors import ConfigError

_PREFIXES_ON_HOST = "--enable-hierarchical-cache"
_LOW_FIRST = "--schedule-low-priority-values-first"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What of this machine decides; torch-free."""

    has_sglang: bool
    num_gpus: int


def look_at_machine(environ: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> Machine:
    """Find out whether SGLang is installed, and count the GPUs that a process may use."""
    shown = environ.get("CUDA_VISIBLE_DEVICES", environ.get("HIP_VISIBLE_DEVICES"))
    if shown is not None:
        num_gpus = len([one for one in shown.split(",") if one.strip() and one.strip() != "-1"])
    else:
        num_gpus = len(list(devices.glob("nvidia[0-9]*"))) or len(list(devices.glob("dri/renderD*")))
    has_driver = (devices / "nvidiactl").exists() or (devices / "kfd").exists()
    return Machine(has_sglang=importlib.util.find_spec("sglang") is not None, num_gpus=num_gpus if has_driver else 0)


def choose_engine(config: Config, *, names_size: bool, machine: Machine) -> tuple[Literal["embedded", "sglang"], str]:
    """Return the engine that --rollout-engine auto means, and why.

    Args:
        names_size: --rollout-num-gpus-per-engine is given.
    """
    engine, cluster = config.engine, config.cluster
    named = [f"--sglang-{word[2:]}" for word in engine.sglang_args if word.startswith("--")]
    if engine.sglang_config is not None:
        named.append("--sglang-config")
    if names_size:
        named.append("--rollout-num-gpus-per-engine")
    if named:
        return "sglang", f"the command line names {named[0]}"
    num_gpus = config.num_ranks + (cluster.rollout_num_gpus or 0)
    if machine.num_gpus == 0:
        return "embedded", "there is no GPU on this machine"
    if num_gpus > 1:
        return "sglang", f"the run has {num_gpus} GPUs"
    return "embedded", "the run has 1 GPU"


def with_engine(config: Config, *, names_size: bool, machine: Machine) -> Config:
    """Return the configuration with its engine chosen."""
    if config.engine.rollout_engine != "auto":
        return replace(config, engine=replace(config.engine, engine_reason="--rollout-engine says so"))
    kind, why = choose_engine(config, names_size=names_size, machine=machine)
    return replace(config, engine=replace(config.engine, rollout_engine=kind, engine_reason=why))


def check_engine_is_installed(config: Config, machine: Machine) -> None:
    """Refuse a start whose engines need a package that is missing.

    Raises:
        ConfigError: SGLang is not installed; names both ways out.
    """
    starts_sglang = config.engine.kind == "sglang" and not config.engine.rollout_external_engine_addrs
    if not config.generates or not starts_sglang or machine.has_sglang:
        return
    if (problem := unknown_sglang_flag(config.engine.sglang_args)) is not None:
        raise ConfigError(problem)
    missing = f"this run needs SGLang ({config.engine.engine_reason}), which is not installed"
    if machine.num_gpus == 0:
        raise ConfigError(
            f"{missing}, and this machine has no GPU: --dry-run checks the flags, --rollout-engine embedded runs on a CPU, "
            "and the GPU machine needs pip install 'qwench[sglang]'"
        )
    raise ConfigError(f"{missing}: run pip install 'qwench[sglang]', or give --rollout-engine embedded")


def engines_divide_gpus(config: Config) -> str | None:
    """Every engine gets as many GPUs."""
    cluster = config.cluster
    num_gpus = cluster.world_size if cluster.shares_devices else cluster.rollout_num_gpus
    if config.engine.sglang_config is not None and not config.engine.facts.reads_embedded_flags:
        return None  # its groups have their own sizes
    if num_gpus and num_gpus % cluster.rollout_num_gpus_per_engine:
        return (
            f"--rollout-num-gpus-per-engine {cluster.rollout_num_gpus_per_engine} does not divide the {num_gpus} GPUs "
            "of the engines"
        )
    return None


def sglang_flags_are_known(config: Config) -> str | None:
    """The installed SGLang checks its own flags; for the embedded engine a spelling mistake would pass unseen."""
    return unknown_sglang_flag(config.engine.sglang_args) if config.engine.facts.reads_embedded_flags else None


def prefixes_do_not_outlive_weights(config: Config) -> str | None:
    """A publication under requests cannot drop SGLang's prefixes, so that its servers start without any."""
    if config.keeps_requests and config.engine.kind == "sglang" and _PREFIXES_ON_HOST in config.engine.sglang_args:
        return (
            f"--sglang-{_PREFIXES_ON_HOST[2:]} would keep prefixes of old weights with --pause-generation-mode "
            f"{config.asynchronous.pause_generation_mode}; leave it out, or give --pause-generation-mode abort"
        )
    return None


def deterministic_engines_are_ours(config: Config) -> str | None:
    """Bits hold where the engine's batches cannot change them."""
    if not config.training.deterministic_mode or config.debug.load_debug_rollout_data is not None:
        return None
    if config.engine.rollout_external_engine_addrs:
        return (
            "--deterministic-mode cannot hold with --rollout-external-engine-addrs: this run does not decide how those engines "
            "compute; leave one of them out"
        )
    if config.engine.kind == "sglang" and not config.engine.sglang_enable_deterministic_inference:
        return (
            "--deterministic-mode with --rollout-engine sglang needs --sglang-enable-deterministic-inference: without it the "
            "batch changes the last bits of a response"
        )
    return None


def evaluations_beside_training_have_engines(config: Config) -> str | None:
    """Evaluations go on while the policy is trained only where engines never stop for it."""
    evaluation, cluster = config.evaluation, config.cluster
    if not evaluation.is_beside:
        return None
    apart = evaluation.eval_num_gpus
    for is_given, reason in (
        (not config.asynchronous.fully_async, "needs --fully-async; without it training waits for evaluations"),
        (not evaluation.has_sets, "has nothing to evaluate on; give --eval-prompt-data NAME FILE"),
        (bool(apart) and cluster.shares_devices, "needs engines on GPUs of their own; give --rollout-num-gpus"),
        (
            bool(apart and config.engine.rollout_external_engine_addrs),
            "starts engines; --rollout-external-engine-addrs has its own",
        ),
        (config.asynchronous.pause_generation_mode == "abort", "needs --pause-generation-mode retract or in_place"),
        (config.training.deterministic_mode, "has another order in every run; leave --deterministic-mode out"),
        (
            evaluation.eval_low_priority and _LOW_FIRST in config.engine.sglang_args,
            f"cannot go with --sglang-{_LOW_FIRST[2:]}, which serves evaluations first; leave one of them out",
        ),
        (config.checkpoint.keep_best, "ends after the weights have changed; leave --keep-best out"),
    ):
        if is_given:
            return f"{f'--eval-num-gpus {apart}' if apart else '--eval-low-priority'} {reason}"
    return None
