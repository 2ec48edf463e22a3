"""Inputs of a run, checked and read before a model is loaded or a device is taken."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qwench.config.config import Config
from qwench.config.devices import divides_models
from qwench.config.eval_sets import EvalSettings
from qwench.config.memory_fit import check_fit
from qwench.config.plan import RunPlan, plan_run, train_dtype
from qwench.config.sections.reward import RewardConfig, split_names
from qwench.data.prompts import LoadedPrompts, load_prompts
from qwench.data.sft import LoadedSft, load_sft
from qwench.errors import ConfigError, counted
from qwench.models.hf import architecture_of, check_vocabulary, load_hf_config, load_tokenizer
from qwench.models.hf_weights import is_fp8_checkpoint
from qwench.observability.console import Console, QuietConsole, open_console
from qwench.rewards.graders import ZERO, needs_label
from qwench.threads import usable_cores

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A checked configuration, its plan, and the small files it names."""

    config: Config
    plan: RunPlan
    model_folder: Path
    hf_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    """Dtype in which the policy computes and is published."""
    console: Console
    rank: int

    @property
    def is_main(self) -> bool:
        """Tell whether this process logs and writes single files."""
        return self.rank == 0

    @property
    def training_reward(self) -> RewardConfig:
        """Return the rewards of training: where a teacher teaches and no label is named, only those that need none."""
        has_labels = self.config.data.label_key is not None or not self.config.distillation.use_opd
        return self.config.reward if has_labels else _without_labels(self.config.reward)

    @property
    def evaluation_reward(self) -> RewardConfig:
        """Return the rewards of all evaluation sets. If one of them names its labels, these are all rewards of the run."""
        reward = replace(self.config.reward, reward_key=self.plan.eval_reward_key)
        has_labels = any(one.label_key is not None for one in self.plan.eval_sets) or not self.config.distillation.use_opd
        return reward if has_labels else _without_labels(reward)

    def reward_of(self, one: EvalSettings) -> RewardConfig:
        """Return the rewards of one evaluation set."""
        reward = self.evaluation_reward
        return reward if one.custom_rm_path is None else replace(reward, custom_rm_path=one.custom_rm_path)

    def with_epochs_of(self, rollouts_per_epoch: int) -> Inputs:
        """Return the inputs with the plan for a data set that fills so many rollouts."""
        return replace(self, plan=self.plan.with_epochs_of(rollouts_per_epoch))


def plan_inputs(config: Config, *, trains: bool) -> RunPlan:
    """Read the model's config.json and plan the run, as both a start and a dry run do.

    Raises:
        ConfigError: the flags do not fit the model.
    """
    device = local_device()
    folder = _model_folder(config)
    model, fp8 = architecture_of(load_hf_config(folder)), is_fp8_checkpoint(folder)
    on_gpus = device.type == "cuda" or plans_what_only_gpus_run(config, trains=trains)
    plan = plan_run(config, model, trains=trains, on_gpus=on_gpus)
    if fp8 and plan.devices.generates and divides_models(config):
        size = config.cluster.rollout_num_gpus_per_engine
        raise ConfigError(
            f"{folder} is FP8 and needs embedded engines of one GPU, got --rollout-num-gpus-per-engine {size}; "
            "convert it to bfloat16 or give one GPU"
        )
    config.training.check_trained(model.parameter_shapes())
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        check_fit(config, plan, device_bytes=total, fp8=fp8)
    return plan


def samples_in_fp8(config: Config) -> bool:
    """Tell whether the weights of the run's engines are FP8, as its checkpoint is."""
    return is_fp8_checkpoint(_model_folder(config))


def plans_what_only_gpus_run(config: Config, *, trains: bool) -> bool:
    """Tell whether this is the dry run of a run that needs GPUs wherever it starts; its memory is that of GPUs."""
    starts_engines = config.generates and not config.engine.rollout_external_engine_addrs
    with_sglang = starts_engines and not config.engine.facts.reads_embedded_flags
    trainer_needs_gpus = config.backend == "megatron" or config.model.attn_implementation != "sdpa"
    return config.debug.dry_run and (with_sglang or (trains and trainer_needs_gpus))


def read_inputs(config: Config, plan: RunPlan) -> Inputs:
    """Read the model's small files and look at this machine.

    Raises:
        ConfigError: a file cannot be read; nothing was loaded.
    """
    folder = _model_folder(config)
    rank = _own_rank()
    device = local_device()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())  # torch knows the affinity mask, but not a container's quota
    tokenizer = load_tokenizer(folder, chat_template=config.data.chat_template_path)
    check_vocabulary(folder, tokenizer, plan.model)
    _check_stop_tokens(config, plan)
    return Inputs(
        config=config,
        plan=plan,
        model_folder=folder,
        hf_config=load_hf_config(folder),
        tokenizer=tokenizer,
        device=device,
        dtype=publication_dtype(config, on_gpu=device.type == "cuda"),
        console=open_console() if rank == 0 else QuietConsole(),
        rank=rank,
    )


def _own_rank() -> int:
    text = os.environ.get("RANK", "0")
    if not text.isdecimal():
        raise ConfigError(f"the environment variable RANK is {text!r}, which is no number; unset it.")
    return int(text)


def _check_stop_tokens(config: Config, plan: RunPlan) -> None:
    named = {"--rollout-stop-token-ids": config.rollout.rollout_stop_token_ids}
    named |= {f"stop_token_ids of evaluation set {one.name}": one.stop_token_ids for one in plan.eval_sets}
    for name, ids in named.items():
        if outside := [token_id for token_id in ids if not 0 <= token_id < plan.model.vocab_size]:
            raise ConfigError(f"{name}: {outside[0]} is no token of the model, whose ids are 0 to {plan.model.vocab_size - 1}.")


def _model_folder(config: Config) -> Path:
    assert config.model.hf_checkpoint is not None, "config.verb_checks requires --hf-checkpoint"
    return config.model.hf_checkpoint


def local_device() -> torch.device:
    """Return this rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def publication_dtype(config: Config, *, on_gpu: bool) -> torch.dtype:
    """Return what --train-dtype means for a trainer on such devices."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[train_dtype(config, on_gpus=on_gpu)]


def read_training_prompts(inputs: Inputs) -> LoadedPrompts:
    """Read --prompt-data and say how many prompts were too long."""
    config = inputs.config
    assert config.data.prompt_data is not None, "config.verb_checks requires --prompt-data"
    loaded = load_prompts(
        config.data.prompt_data,
        input_key=config.data.input_key,
        label_key=config.data.label_key,
        metadata_key=config.data.metadata_key,
        tool_key=config.data.tool_key,
        tokenizer=inputs.tokenizer,
        apply_chat_template=config.data.apply_chat_template,
        apply_chat_template_kwargs=config.data.apply_chat_template_kwargs,
        max_prompt_len=(limit := prompt_limit(inputs, config.data.rollout_max_prompt_len)),
        pass_rate_key=config.data.curriculum_key,
        require_label=_compares_labels(inputs.training_reward),
        as_given=_reads_prompts_itself(config),
    )
    _log_dropped("--prompt-data", loaded, limit)
    if (graded_by := inputs.training_reward) is not config.reward:
        _logger.warning(
            "no --label-key: --rm-type %s is graded as %s, and the policy learns from the teacher of --use-opd",
            config.reward.rm_type,
            graded_by.rm_type,
        )
    _check_room(inputs, loaded)
    _warn_of_repeats(inputs, len(loaded.prompts), "prompt")
    return loaded


def _reads_prompts_itself(config: Config) -> bool:
    """Tell whether a function of the user's turns a prompt into tokens."""
    return config.rollout.custom_generate_function_path is not None or config.rollout.rollout_function_path is not None


@contextmanager
def names_set(name: str) -> Iterator[None]:
    """Name the evaluation set in what is refused."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"evaluation set {name}: {error}") from error


def read_eval_prompts(inputs: Inputs) -> dict[str, LoadedPrompts]:
    """Read every set of --eval-prompt-data or --eval-config."""
    config, sets = inputs.config, dict[str, LoadedPrompts]()
    for settings in inputs.plan.eval_sets:
        with names_set(settings.name):
            loaded = load_prompts(
                settings.path,
                input_key=settings.input_key,
                label_key=settings.label_key,
                metadata_key=settings.metadata_key,
                tool_key=settings.tool_key,
                tokenizer=inputs.tokenizer,
                apply_chat_template=config.data.apply_chat_template,
                apply_chat_template_kwargs=config.data.apply_chat_template_kwargs,
                max_prompt_len=(limit := prompt_limit(inputs, settings.max_prompt_len)),
                require_label="rm_type" not in settings.row_metadata and _compares_labels(inputs.reward_of(settings)),
                key_flags=config.evaluation.key_flags,
                as_given=_reads_prompts_itself(config) or settings.custom_generate_function_path is not None,
            )
        _log_dropped(f"evaluation set {settings.name}", loaded, limit)
        sets[settings.name] = loaded.with_metadata(settings.row_metadata)
    return sets


def read_conversations(inputs: Inputs) -> tuple[LoadedSft, dict[str, LoadedSft]]:
    """Read the conversations of fine-tuning and of each evaluation set, and say how many cannot be used."""
    config, data = inputs.config, inputs.config.data
    assert data.prompt_data is not None, "config.verb_checks requires --prompt-data"
    limit = min(config.rollout.rollout_max_context_len or inputs.plan.model.max_positions, inputs.plan.model.max_positions)

    def read(what: str, path: str, *, input_key: str, flag: str, tool_key: str) -> LoadedSft:
        loaded = load_sft(
            path,
            input_key=input_key,
            flag=flag,
            tool_key=tool_key,
            tokenizer=inputs.tokenizer,
            loss_mask_type=config.data.loss_mask_type,
            apply_chat_template_kwargs=config.data.apply_chat_template_kwargs,
            max_len=limit,
        )
        if loaded.num_too_long or loaded.num_untrained:
            _logger.warning(
                "%s: dropped %s longer than %d tokens (--rollout-max-context-len or the model) "
                "and %d without a token to train on; left: %d",
                what,
                counted(loaded.num_too_long, "conversation"),
                limit,
                loaded.num_untrained,
                len(loaded.examples),
            )
        if loaded.differing:
            _logger.warning(
                "%s: --loss-mask-type %s trains on other text than the chat template marks as the assistant's, in %d "
                "conversations, the first at %s; leave it out to train on what the template marks",
                what,
                config.data.loss_mask_type,
                len(loaded.differing),
                loaded.differing[0],
            )
        return loaded

    eval_flag = config.evaluation.key_flags["input_key"]
    trained = read("--prompt-data", data.prompt_data, input_key=data.input_key, flag="--input-key", tool_key=data.tool_key)
    _warn_of_repeats(inputs, len(trained.examples), "conversation")
    return trained, {
        one.name: read(f"evaluation set {one.name}", one.path, input_key=one.input_key, flag=eval_flag, tool_key=one.tool_key)
        for one in inputs.plan.eval_sets
    }


def prompt_limit(inputs: Inputs, asked: int | None) -> int:
    """Return the longest allowed prompt: the limit that was asked for, or less to leave room for one response token."""
    config = inputs.config
    limits = (inputs.plan.model.max_positions, config.rollout.rollout_max_context_len, _pool_tokens(config))
    return min(limit for limit in (asked, *(limit and limit - 1 for limit in limits)) if limit is not None)


def _pool_tokens(config: Config) -> int | None:
    """Return the size of the engine's KV cache in tokens where a flag sets it."""
    return config.engine.embedded_kv_cache_tokens if config.engine.facts.reads_embedded_flags else None


def _check_room(inputs: Inputs, loaded: LoadedPrompts) -> None:
    """Compare prompts and the response length with the engine's KV cache and the model's positions.

    Raises:
        ConfigError: --embedded-kv-cache-tokens cannot hold one response.
    """
    config, positions = inputs.config, inputs.plan.model.max_positions
    response, pool = config.rollout.rollout_max_response_len, _pool_tokens(config)
    if response is None:
        return
    longest = max(len(prompt.token_ids) for prompt in loaded.prompts)
    if pool is not None and pool < longest + response:
        raise ConfigError(
            f"--embedded-kv-cache-tokens {pool} cannot hold one response of {response} tokens (--rollout-max-response-len) "
            f"behind the longest prompt ({longest}); raise it to {longest + response} or more."
        )
    if response + longest > positions:
        _logger.warning(
            "--rollout-max-response-len %d: the model has %d positions, so responses end at %d tokens less the prompt's",
            response,
            positions,
            positions,
        )


def _without_labels(reward: RewardConfig) -> RewardConfig:
    """Return the rewards that need no label, with their weights; 0 for every response where all need one."""
    return reward.without(needs_label, otherwise=ZERO) if _compares_labels(reward) else reward


def _compares_labels(reward: RewardConfig) -> bool:
    """Tell whether the reward compares with a label; a custom one decides for itself."""
    return reward.custom_rm_path is None and any(needs_label(name) for name in split_names(reward.rm_type or ""))


def _log_dropped(flag: str, loaded: LoadedPrompts, limit: int | None) -> None:
    """Warn of prompts over the limit; silence would hide a wrong limit."""
    if loaded.num_dropped:
        total = loaded.num_dropped + len(loaded.prompts)
        _logger.warning("%s: dropped %d of %s longer than %s tokens", flag, loaded.num_dropped, counted(total, "prompt"), limit)


def _warn_of_repeats(inputs: Inputs, num_rows: int, noun: str) -> None:
    if num_rows < (size := inputs.plan.batch.rollout_batch_size):
        _logger.warning(
            "--prompt-data has %s for --rollout-batch-size %d: a rollout has some more than once", counted(num_rows, noun), size
        )
