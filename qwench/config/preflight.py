"""What must hold before a verb starts: the flags it needs, and the files they name. Nothing is loaded here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qwench.config.algorithm import SAMPLE_ESTIMATORS, AlgorithmConfig
from qwench.config.checkpoint import CheckpointConfig
from qwench.config.cluster import ClusterConfig
from qwench.config.compat import EMBEDDED_ALIASES, SFT_ROLLOUT
from qwench.config.config import Config
from qwench.config.engine import EngineConfig
from qwench.config.eval_settings import eval_sets, resolve_eval_sets
from qwench.config.flags import flag_name
from qwench.config.model import ModelConfig
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


def warnings(config: Config, *, trains: bool = True) -> Iterator[str]:
    """Yield what is allowed but perhaps not meant.

    Args:
        trains: the verb trains; evaluation alone does not care about flags of training.
    """
    if trains:
        yield from _training_warnings(config)
        yield from _unused_evaluation(config)
    if config.engine.rollout_engine == "embedded":
        yield from _unused_by_embedded_engine(config)


def _training_warnings(config: Config) -> Iterator[str]:
    training, rollout = config.training, config.rollout
    if training.max_tokens_per_gpu is not None and rollout.rollout_max_response_len is not None:
        longest = (
            rollout.rollout_max_context_len or (config.data.rollout_max_prompt_len or 0) + rollout.rollout_max_response_len
        )
        budget = training.max_tokens_per_gpu * config.parallel.context_parallel_size
        if budget < longest:
            yield (
                f"--max-tokens-per-gpu ({training.max_tokens_per_gpu}) is smaller than the longest sample ({longest} tokens); "
                "such a sample makes a micro-batch of its own that exceeds the budget"
            )
    if rollout.n_samples_per_prompt == 1 and _compares_siblings(config.algorithm):
        yield (
            "--n-samples-per-prompt 1: rewards are compared within their group, so every advantage is 0, nothing is learned; "
            "raise it, or give --disable-rewards-normalization"
        )
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        yield "--sequence-parallel has no effect without tensor parallelism"
    if config.cluster.num_gpus_per_node != ClusterConfig().num_gpus_per_node:
        yield "--num-gpus-per-node has no effect without a cluster of several nodes"


def _unused_evaluation(config: Config) -> Iterator[str]:
    flag = "--eval-config" if config.evaluation.eval_config is not None else "--eval-prompt-data"
    if not config.evaluation.has_sets:
        return
    if config.algorithm.loss_type == "sft_loss":
        yield f"{flag} has no effect here: fine-tuning has no engine; use qwench eval on what --save-hf writes"
    elif config.debug.load_debug_rollout_data is not None:
        yield f"{flag} has no effect here: recorded rollouts are learned from without an engine"


def _unused_by_embedded_engine(config: Config) -> Iterator[str]:
    engine, default = config.engine, EngineConfig()
    if engine.use_fault_tolerance:
        yield "--use-fault-tolerance has no effect on the embedded engine, which lives and dies with this process"
    for name in ("rollout_health_check_first_wait", "rollout_health_check_interval", "rollout_health_check_timeout"):
        if getattr(engine, name) != getattr(default, name):
            yield f"--{flag_name(name)} has no effect on the embedded engine, which lives and dies with this process"
    if config.cluster.rollout_num_gpus_per_engine > 1:
        yield "--rollout-num-gpus-per-engine has no effect on the embedded engine, which runs on one GPU"
    yield from _unused_pass_through(engine.sglang_args, engine.router_args)


def _compares_siblings(algorithm: AlgorithmConfig) -> bool:
    centred = algorithm.advantage_estimator in (*SAMPLE_ESTIMATORS, "reinforce_plus_plus_baseline")
    return algorithm.loss_type == "policy_loss" and centred and not algorithm.disable_rewards_normalization


def _unused_pass_through(sglang_args: tuple[str, ...], router_args: tuple[str, ...]) -> Iterator[str]:
    unused = [f"--sglang-{word[2:]}" for word in sglang_args if word.startswith("--") and word[2:] not in EMBEDDED_ALIASES]
    unused += [f"--router-{word[2:]}" for word in router_args if word.startswith("--")]
    if unused:
        yield f"the embedded engine makes no use of {' '.join(unused)}"


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
