"""Checks between a method and the sections of its models."""

from __future__ import annotations

from dataclasses import fields

from qwench.config.config import Config
from qwench.errors import ConfigError


def check_methods(config: Config) -> None:
    """Check that every model of a method has a method that uses it.

    Raises:
        ConfigError: a flag of the critic without PPO; advantages of the user's own with PPO or distillation; distillation in
            fine-tuning.
    """
    _check_distillation(config)
    if config.algorithm.has_critic:
        if config.references.custom_advantage_function_path is not None:
            raise ConfigError(
                "--custom-advantage-function-path replaces the returns that the critic of --advantage-estimator ppo learns "
                "from; leave it out, or choose another estimator"
            )
        return
    name = config.algorithm.advantage_estimator
    for item in fields(config.critic):
        value = getattr(config.critic, item.name)
        if value != item.default:
            flag = "--" + item.name.replace("_", "-")
            raise ConfigError(
                f"{flag} ({value}) has no effect with --advantage-estimator {name}, which has no critic; leave it out"
            )


def _check_distillation(config: Config) -> None:
    if not config.distillation.use_opd:
        return
    if config.algorithm.loss_type == "sft_loss":
        raise ConfigError("--use-opd has no effect with --loss-type sft_loss, which has no advantages; leave it out")
    if config.references.custom_advantage_function_path is not None:
        raise ConfigError("--use-opd and --custom-advantage-function-path both set the advantages; leave one of them out")
