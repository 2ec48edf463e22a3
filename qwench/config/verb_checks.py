"""What each verb needs: its flags, and the files that they name.

A section checks its own values when it is made. `command_line.parse` applies the `rules` for every verb, and then the check of
the verb. Nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from qwench.config.config import Config
from qwench.config.eval_sets import eval_settings
from qwench.config.named_files import (
    check_all,
    check_checkpoint,
    check_data_file,
    check_eval_data,
    check_outputs,
    check_starting_point,
)
from qwench.config.sections.rollout import SFT_ROLLOUT
from qwench.config.sections.verbs import ServeConfig
from qwench.errors import ConfigError


def check_train(config: Config) -> None:
    """Check what `qwench train` needs: reinforcement learning, or fine-tuning with --loss-type sft_loss.

    Raises:
        ConfigError: flags are missing, all named at once, or a file that one names is not there.
    """
    if config.algorithm.loss_type == "sft_loss":
        check_sft(config)
        return
    debug, rollout = config.debug, config.rollout
    grades = config.reward.rm_type is not None or config.reward.custom_rm_path is not None
    _require_all("qwench train", {
        "--hf-checkpoint": config.model.hf_checkpoint is not None,
        "--prompt-data": not _reads_prompts(config) or config.data.prompt_data is not None,
        # Rows may name their own rewards, which is seen where there are rows.
        "--rm-type or --custom-rm-path": grades or not _reads_prompts(config) or config.data.prompt_data is not None,
        "--lr": debug.debug_rollout_only or config.optimizer.lr is not None,
        "--num-rollout or --num-epoch": _has_length(config),
        "--rollout-batch-size": rollout.rollout_batch_size is not None,
        "--rollout-max-response-len": debug.debug_train_only or rollout.rollout_max_response_len is not None,
    })  # fmt: skip
    _check_files(config)


def check_sft(config: Config) -> None:
    """Check what supervised fine-tuning needs.

    Raises:
        ConfigError: flags are missing, all named at once, or a file that one names is not there.
    """
    if config.algorithm.loss_type != "sft_loss":
        raise ConfigError(
            f"qwench sft trains with --loss-type sft_loss, got {config.algorithm.loss_type}; use qwench train for RL"
        )
    _require_all("qwench sft", {
        "--hf-checkpoint": config.model.hf_checkpoint is not None,
        "--prompt-data": not _reads_prompts(config) or config.data.prompt_data is not None,
        "--lr": config.optimizer.lr is not None,
        "--num-rollout or --num-epoch": _has_length(config),
        "--rollout-batch-size": config.rollout.rollout_batch_size is not None,
    })  # fmt: skip
    _check_files(config)


def check_eval(config: Config) -> None:
    """Check what evaluation needs.

    Raises:
        ConfigError: flags are missing, all named at once, or a file that one names is not there.
    """
    model = [] if config.model.hf_checkpoint is None else [partial(check_checkpoint, config.model)]
    check_all(*model, partial(check_eval_data, config))
    has_sets = config.evaluation.has_sets
    lengths = [one.max_response_len for one in eval_settings(config.evaluation, config.rollout, config.data)]
    if not has_sets:
        lengths = [config.evaluation.eval_max_response_len or config.rollout.rollout_max_response_len]
    _require_all("qwench eval", {
        "--hf-checkpoint": config.model.hf_checkpoint is not None,
        "--eval-prompt-data or --eval-config": has_sets,
        "--eval-max-response-len": None not in lengths,
    })  # fmt: skip
    check_outputs(config)


def check_serve(config: ServeConfig) -> None:
    """Check what `qwench serve` needs.

    Raises:
        ConfigError: --hf-checkpoint is missing or no checkpoint.
    """
    _require_all("qwench serve", {"--hf-checkpoint": config.model.hf_checkpoint is not None})
    check_checkpoint(config.model)


_MEANINGS: Mapping[str, str] = {
    "--hf-checkpoint": "a Hugging Face checkpoint: its folder, or OWNER/NAME of the hub",
    "--prompt-data": "the training data: a file, a folder, or OWNER/NAME of the hub",
    "--rm-type or --custom-rm-path": "the reward, where rows do not name their own",
    "--lr": "the peak learning rate",
    "--num-rollout or --num-epoch": "the length of the run",
    "--rollout-batch-size": "the prompts or conversations in a rollout",
    "--rollout-max-response-len": "the most tokens of a response",
    "--eval-prompt-data or --eval-config": "what to evaluate on, as NAME FILE",
    "--eval-max-response-len": "the most tokens of a response",
}


def _require_all(verb: str, given: Mapping[str, bool]) -> None:
    """Raise one error that names every flag of `given` that is not there."""
    missing = [flag for flag, is_given in given.items() if not is_given]
    if len(missing) == 1:
        raise ConfigError(f"{missing[0]} is required: {_MEANINGS[missing[0]]}")
    if missing:
        named = ", ".join(f"{flag} ({_MEANINGS[flag]})" for flag in missing)
        raise ConfigError(f"{verb} requires {named}; {verb} --help shows a typical command")


def _has_length(config: Config) -> bool:
    return config.rollout.num_rollout is not None or config.rollout.num_epoch is not None


def _reads_prompts(config: Config) -> bool:
    replaced = config.rollout.rollout_function_path not in (None, SFT_ROLLOUT)
    return config.debug.load_debug_rollout_data is None and not replaced and not config.data.brings_prompts


def _check_files(config: Config) -> None:
    """Check the files that the flags of training name."""
    data = config.data.prompt_data if _reads_prompts(config) else None
    check_all(
        partial(check_checkpoint, config.model),
        *([] if data is None else [partial(check_data_file, "--prompt-data", data)]),
        partial(check_eval_data, config),
        partial(check_starting_point, config.checkpoint),
        partial(check_outputs, config),
    )
