"""What can be checked and read before a model is loaded or a device is taken."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qwench.config import Config
from qwench.config.plan import Resolved
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.training import TrainingConfig
from qwench.data.prompts import LoadedPrompts, load_prompts
from qwench.models.hf import load_hf_config, load_tokenizer
from qwench.models.registry import check_architecture
from qwench.observability.console import Console, QuietConsole, open_console
from qwench.rewards.graders import needs_label
from qwench.training.megatron.layout import ParallelLayout, check_layout

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A checked configuration and the small files it names."""

    config: Config
    resolved: Resolved
    model_folder: Path
    hf_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    """In which the policy is computed and published."""
    console: Console
    rank: int

    @property
    def is_main(self) -> bool:
        """Tell whether this process logs and writes single files."""
        return self.rank == 0

    @property
    def training(self) -> TrainingConfig:
        """Return the training section with the batch identity filled in."""
        return replace(
            self.config.training,
            global_batch_size=self.resolved.global_batch_size,
            num_steps_per_rollout=self.resolved.num_steps_per_rollout,
        )


def read_inputs(config: Config) -> Inputs:
    """Check the configuration against the model's folder and this machine.

    Raises:
        ConfigError: something does not fit; nothing was loaded.
    """
    hf_config = check_model(config)
    folder = config.model.hf_checkpoint
    assert folder is not None, "check_model has read it"
    rank = int(os.environ.get("RANK", "0"))
    device = local_device()
    return Inputs(
        config=config,
        resolved=config.resolve(),
        model_folder=folder,
        hf_config=hf_config,
        tokenizer=load_tokenizer(folder),
        device=device,
        dtype=publication_dtype(config, on_gpu=device.type == "cuda"),
        console=open_console() if rank == 0 else QuietConsole(),
        rank=rank,
    )


def check_model(config: Config) -> PretrainedConfig:
    """Return the model's config.json, after comparing the flags of architecture and parallelism with it.

    Raises:
        ConfigError: they do not fit.
    """
    folder = config.model.hf_checkpoint
    assert folder is not None, "preflight checks that --hf-checkpoint is given"
    hf_config = load_hf_config(folder)
    check_architecture(config.architecture, hf_config)
    if config.backend == "megatron":
        check_layout(parallel_layout(config.parallel), hf_config, world_size=config.cluster.world_size)
    return hf_config


def parallel_layout(parallel: ParallelConfig) -> ParallelLayout:
    """Translate the parallel sizes for Megatron."""
    return ParallelLayout(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        sequence_parallel=parallel.splits_sequence,
    )


def local_device() -> torch.device:
    """Return this rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def publication_dtype(config: Config, *, on_gpu: bool) -> torch.dtype:
    """Return what --train-dtype means for a trainer on such devices."""
    if config.model.train_dtype == "auto":
        return torch.bfloat16 if on_gpu else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.train_dtype]


def read_training_prompts(inputs: Inputs) -> LoadedPrompts:
    """Read --prompt-data and say how many prompts were too long."""
    config = inputs.config
    assert config.data.prompt_data is not None, "preflight checks that --prompt-data is given"
    loaded = load_prompts(
        config.data.prompt_data,
        input_key=config.data.input_key,
        label_key=config.data.label_key,
        metadata_key=config.data.metadata_key,
        tool_key=config.data.tool_key,
        tokenizer=inputs.tokenizer,
        apply_chat_template=config.data.apply_chat_template,
        apply_chat_template_kwargs=config.data.apply_chat_template_kwargs,
        max_prompt_len=config.data.rollout_max_prompt_len,
        require_label=needs_labels(config),
    )
    _log_dropped("--prompt-data", loaded, config.data.rollout_max_prompt_len)
    return loaded


def read_eval_prompts(inputs: Inputs) -> dict[str, LoadedPrompts]:
    """Read every set of --eval-prompt-data or --eval-config."""
    config, sets = inputs.config, dict[str, LoadedPrompts]()
    for settings in inputs.resolved.eval_sets:
        loaded = load_prompts(
            settings.path,
            input_key=settings.input_key,
            label_key=settings.label_key,
            metadata_key=settings.metadata_key,
            tool_key=settings.tool_key,
            tokenizer=inputs.tokenizer,
            apply_chat_template=config.data.apply_chat_template,
            apply_chat_template_kwargs=config.data.apply_chat_template_kwargs,
            max_prompt_len=settings.max_prompt_len,
            require_label="rm_type" not in settings.metadata_overrides and needs_labels(config),
        )
        _log_dropped(f"evaluation set {settings.name}", loaded, settings.max_prompt_len)
        sets[settings.name] = loaded.with_metadata(settings.metadata_overrides)
    return sets


def needs_labels(config: Config) -> bool:
    """Tell whether the reward compares with a label; a custom one decides for itself."""
    reward = config.reward
    return reward.custom_rm_path is None and reward.rm_type is not None and needs_label(reward.rm_type)


def _log_dropped(flag: str, loaded: LoadedPrompts, limit: int | None) -> None:
    """Warn of prompts over the limit; silence would hide a wrong limit."""
    if loaded.num_dropped:
        total = loaded.num_dropped + len(loaded.prompts)
        _logger.warning("%s: dropped %d of %d prompts longer than %s tokens", flag, loaded.num_dropped, total, limit)
