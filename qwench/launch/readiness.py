"""What a start checks before it takes a device or loads a weight, data apart; a dry run executes the same list.

Nothing here writes, and nothing stays open.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec

import torch

from qwench.checkpoints.folders import check_load_folder, check_save_folder, check_weights, teacher_weights
from qwench.checkpoints.formats.sources import open_weights
from qwench.cluster.bundles import plan_bundles
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sglang_flags import unknown_sglang_flag
from qwench.engines.kinds import KINDS
from qwench.engines.kinds.sglang_router import check_router_words
from qwench.errors import CheckpointError, ConfigError
from qwench.launch.engines import check_external
from qwench.launch.inputs import Inputs, plans_what_only_gpus_run
from qwench.launch.placement import Launcher, check_turns, choose_launcher, enough_gpus
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.hf_weights import has_weights
from qwench.observability.prometheus import check_port
from qwench.observability.tracking import import_mlflow, import_tensorboard, import_wandb
from qwench.rewards.graders import check_installed
from qwench.samples import Json, Prompt
from qwench.training.fsdp.attention import check_attention
from qwench.training.megatron.platform import check_platform, check_transformer_impl

_logger = logging.getLogger(__name__)


def check_ready(
    inputs: Inputs, identity: Mapping[str, Json] | None = None, *, prompts: Iterable[Sequence[Prompt]] = ()
) -> None:
    """Check everything that a run needs of this machine and of the folders that flags name.

    Args:
        identity: what the run shares with the folder of --save; None: it saves nothing.
        prompts: the rows of each data set; their graders must be installed.

    Raises:
        ConfigError: the user's mistake, or a package or device that is not there.
    """
    if inputs.config.profiling.record_memory_history and inputs.device.type != "cuda":
        raise ConfigError("--record-memory-history records the memory of a GPU, and there is none here; leave it out")
    launcher = _check_launcher(inputs)
    elsewhere = _plans_for_gpus_elsewhere(inputs)
    if elsewhere:
        _logger.warning(
            "this machine has no GPU, and the run asks for %d: its packages, devices and weights are not checked here",
            plan_bundles(inputs.config.cluster, inputs.plan.devices).num_devices,
        )
    if inputs.plan.devices.trains and not elsewhere:
        _check_trainer(inputs, launcher)
        check_trackers(inputs.config.logging)
    check_engines(inputs, elsewhere=elsewhere)
    if identity is not None and inputs.is_main:
        check_save_folder(inputs.config.checkpoint, identity)
        check_load_folder(inputs.config.checkpoint, identity)
    if elsewhere:
        return
    for rows in prompts:
        check_installed(inputs.config.reward, rows)
    # A dry run needs only config.json: its weights may not be there yet.
    looks = has_weights(inputs.model_folder) or not inputs.config.debug.dry_run
    lora = inputs.config.lora if inputs.config.lora.enabled else None
    check_weights(inputs.config.checkpoint, inputs.plan.model, inputs.model_folder if looks else None, lora=lora)
    if inputs.plan.holds_teacher:
        _check_teacher(inputs)


def _check_teacher(inputs: Inputs) -> None:
    """Check that the teacher's weights mean the same model as the policy's: both are computed as config.json says.

    Raises:
        ConfigError: there are none, or its config.json says otherwise.
    """
    folder = teacher_weights(inputs.config.distillation)
    try:
        open_weights(folder, inputs.plan.model)
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"--opd-teacher-load: {error}") from error
    if not (folder / "config.json").is_file():
        return
    own = asdict(inputs.plan.model)
    differing = [name for name, value in asdict(architecture_of(load_hf_config(folder))).items() if value != own[name]]
    if differing := [name for name in differing if name not in ("max_position_embeddings", "model_type")]:
        raise ConfigError(
            f"--opd-teacher-load: {folder} computes otherwise than the policy ({', '.join(differing)}), and both are computed "
            "as config.json of --hf-checkpoint says; give a teacher of the policy's architecture."
        )


def check_engines(inputs: Inputs, *, elsewhere: bool) -> None:
    """Check that the engines' programs are installed and take the flags, or that engines that run already serve this model.

    Args:
        elsewhere: the programs are those of another machine: only the names of the flags can be checked.

    Raises:
        ConfigError: they do not.
    """
    engine = inputs.config.engine
    if not inputs.plan.devices.generates:
        return
    if elsewhere:
        problem = unknown_sglang_flag(engine.sglang_args)
        if problem is not None:
            raise ConfigError(problem)
        return
    if engine.routes_requests:
        check_router_words(engine.router_args)
    if engine.rollout_external_engine_addrs:
        check_external(inputs)
    else:
        KINDS[engine.kind].check_flags(engine)


def _plans_for_gpus_elsewhere(inputs: Inputs) -> bool:
    """Tell whether this is the dry run of a run on several GPUs, or of one that only GPUs run, on a machine without a GPU."""
    several = plan_bundles(inputs.config.cluster, inputs.plan.devices).num_devices > 1
    with_sglang = not inputs.config.engine.facts.reads_embedded_flags
    asks_for_gpus = several or with_sglang or plans_what_only_gpus_run(inputs.config, trains=inputs.plan.devices.trains)
    return inputs.config.debug.dry_run and asks_for_gpus and not torch.cuda.is_available()


def check_trackers(flags: LoggingConfig) -> None:
    """Check that the packages of the trackers can be imported.

    Raises:
        ConfigError: one cannot.
    """
    if flags.use_tensorboard:
        import_tensorboard()
    if flags.use_mlflow:
        import_mlflow()
    if flags.use_prometheus:
        check_port(flags.prometheus_port)
    if flags.use_wandb:
        import_wandb()


def _check_launcher(inputs: Inputs) -> Launcher:
    config, devices = inputs.config, inputs.plan.devices
    launcher = choose_launcher(config, os.environ, generates=devices.generates)
    if launcher == "ray":
        if find_spec("ray") is None:
            raise ConfigError("--launcher ray needs Ray, which is not installed; pip install 'qwench[ray]'.")
    else:
        check_turns(config, on_gpus=torch.cuda.is_available())
        enough_gpus(inputs)
    return launcher


def _check_trainer(inputs: Inputs, launcher: Launcher) -> None:
    """Check the backend's packages and devices; those of a Ray cluster's nodes are seen by the ranks there."""
    config = inputs.config
    if launcher == "ray":
        return
    if config.backend == "megatron":
        check_platform()
        check_transformer_impl(config.training.transformer_impl)
    else:
        check_attention(config.model.attn_implementation, device=inputs.device, dtype=inputs.dtype)
