"""What must hold before a verb starts: the flags it needs, and the files they name. Nothing is loaded here."""

from __future__ import annotations

import re
from pathlib import Path

from qwench.config.command_line.compat import SFT_ROLLOUT
from qwench.config.config import Config
from qwench.config.eval_settings import eval_sets, resolve_eval_sets
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.model import ModelConfig
from qwench.errors import ConfigError
from qwench.files import check_can_hold

_SLICE = re.compile(r"@\[[^\]]*\]$")


def check_train(config: Config) -> None:
    """Check what reinforcement learning needs.

    Raises:
        ConfigError: a flag is missing or a file it names is not there.
    """
    _require("--lr", config.optimizer.lr, "the highest learning rate", needed=not config.debug.debug_rollout_only)
    _require_length_of_run(config)
    _require("--rollout-batch-size", config.rollout.rollout_batch_size, "the number of prompts in a rollout")
    _check_sampling_is_unrestricted(config)
    if not config.debug.debug_train_only:
        _require("--rollout-max-response-len", config.rollout.rollout_max_response_len, "the most tokens of a response")
    check_checkpoint(config.model)
    _check_training_data(config)
    _check_eval_data(config)
    _check_starting_point(config.checkpoint)
    _check_outputs(config)


def check_sft(config: Config) -> None:
    """Check what supervised fine-tuning needs.

    Raises:
        ConfigError: a flag is missing or a file it names is not there.
    """
    if config.algorithm.loss_type != "sft_loss":
        raise ConfigError(
            f"qwench sft trains with --loss-type sft_loss, got {config.algorithm.loss_type}; use qwench train for RL"
        )
    _require("--lr", config.optimizer.lr, "the highest learning rate")
    _require_length_of_run(config)
    _require("--rollout-batch-size", config.rollout.rollout_batch_size, "the number of conversations in a batch")
    check_checkpoint(config.model)
    _check_training_data(config)
    _check_starting_point(config.checkpoint)
    _check_outputs(config)


def check_eval(config: Config) -> None:
    """Check what evaluation needs.

    Raises:
        ConfigError: a flag is missing or a file it names is not there.
    """
    if not config.evaluation.has_sets:
        raise ConfigError("qwench eval needs something to evaluate on; give --eval-prompt-data NAME FILE")
    check_checkpoint(config.model)
    _check_eval_data(config)
    for one in resolve_eval_sets(config.evaluation, config.rollout, config.data):
        _require("--eval-max-response-len", one.max_response_len, "the most tokens of a response")
    _check_outputs(config)


def check_checkpoint(model: ModelConfig) -> None:
    """Check that --hf-checkpoint names a Hugging Face folder."""
    folder = model.hf_checkpoint
    if folder is None:
        raise ConfigError("--hf-checkpoint is required: the folder of a Hugging Face checkpoint")
    if not folder.is_dir():
        raise ConfigError(f"--hf-checkpoint: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--hf-checkpoint: {folder} has no config.json; is it a Hugging Face checkpoint?")


def _require(flag: str, value: object, meaning: str, *, needed: bool = True) -> None:
    if needed and value is None:
        raise ConfigError(f"{flag} is required: {meaning}")


def _require_length_of_run(config: Config) -> None:
    if config.rollout.num_rollout is None and config.rollout.num_epoch is None:
        raise ConfigError("--num-rollout or --num-epoch is required: the length of the run")


def _check_sampling_is_unrestricted(config: Config) -> None:
    for flag, value, neutral in (
        ("--rollout-top-p", config.rollout.rollout_top_p, 1.0),
        ("--rollout-top-k", config.rollout.rollout_top_k, -1),
        ("--rollout-min-p", config.rollout.rollout_min_p, 0.0),
    ):
        if value != neutral:
            raise ConfigError(
                f"{flag} must be {neutral} in training, got {value}: the trainer's log-probs are of the whole vocabulary; "
                f"for evaluation use --eval-{flag.removeprefix('--rollout-')}"
            )


def _check_training_data(config: Config) -> None:
    if config.debug.load_debug_rollout_data is not None or config.rollout.rollout_function_path not in (None, SFT_ROLLOUT):
        return
    if config.data.prompt_data is None:
        raise ConfigError("--prompt-data is required: a .jsonl or .parquet file of prompts")
    _check_data_file("--prompt-data", config.data.prompt_data)


def _check_eval_data(config: Config) -> None:
    evaluation = config.evaluation
    flag = "--eval-prompt-data" if evaluation.eval_config is None else f"--eval-config: {evaluation.eval_config}"
    for one in eval_sets(evaluation):
        _check_data_file(flag, one.path)


def _check_data_file(flag: str, spec: str) -> None:
    path = Path(_SLICE.sub("", spec))
    if not path.is_file():
        raise ConfigError(f"{flag}: there is no file {path}")


def _check_starting_point(checkpoint: CheckpointConfig) -> None:
    if checkpoint.ref_load is not None and not checkpoint.ref_load.is_dir():
        raise ConfigError(f"--ref-load: there is no folder {checkpoint.ref_load}")
    if checkpoint.load is None or checkpoint.ref_load is not None or checkpoint.load == checkpoint.save:
        return
    if not checkpoint.load.is_dir() or not any(checkpoint.load.iterdir()):
        raise ConfigError(
            f"--load: {checkpoint.load} is missing or empty, and there is no --ref-load to start from; "
            "leave --load out to start from --hf-checkpoint"
        )


def _check_outputs(config: Config) -> None:
    """Check that a run will not fail when it first writes."""
    for flag, folder in (
        ("--save", config.checkpoint.save),
        ("--save-hf", config.checkpoint.save_hf),
        ("--log-dir", config.logging.log_dir),
        ("--eval-output", config.evaluation.eval_output),
    ):
        if folder is not None:
            check_can_hold(Path(folder), flag=flag)
    if config.debug.save_debug_rollout_data is not None:
        check_can_hold(Path(config.debug.save_debug_rollout_data).parent, flag="--save-debug-rollout-data")
