"""Rules of methods that contradict each other."""

import pytest

from qwench.config.config import Config
from qwench.config.rules import check_rules
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep_old_actor": True}, "--use-rollout-entropy is of one policy, and --keep-old-actor scores by several"),
        ({"skip_actor_forward_only": True}, "--use-rollout-entropy needs the old log-probs that --skip-actor-forward-only"),
    ],
)
def test_entropy_before_the_first_step_needs_a_pass_of_one_policy(flags, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_rules(
            Config(rollout=RolloutConfig(rollout_batch_size=1), algorithm=AlgorithmConfig(use_rollout_entropy=True, **flags))
        )


FROZEN = {"freeze_params_name_list": ("embed",)}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": TrainingConfig(train_backend="megatron", **FROZEN)}, "the backend megatron; give --train-backend fsdp"),
        ({"training": TrainingConfig(whole_weights=True, **FROZEN)}, "--whole-weights"),
        ({"training": TrainingConfig(**FROZEN), "lora": LoraConfig(lora_rank=4)}, "--lora-rank"),
        (
            {"training": TrainingConfig(**FROZEN), "algorithm": AlgorithmConfig(advantage_estimator="ppo")},
            "--advantage-estimator",
        ),
    ],
)
def test_frozen_parameters_are_refused_where_they_are_not_built(sections, message):
    with pytest.raises(ConfigError, match=f"^--freeze-params-name-list does not work with {message}"):
        check_rules(Config(rollout=RolloutConfig(rollout_batch_size=1), **sections))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"freeze_params_name_list": ("[",)}, r"--freeze-params-name-list: '\[' is no regular expression"),
        ({"only_train_params_name_list": ("a",), "freeze_params_name_list": ("b",)}, "both choose what is trained"),
    ],
)
def test_expressions_are_checked_with_the_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"freeze_params_name_list": ("embed", "linear_qkv")},
            "'linear_qkv' matches no parameter of the model, .* like embed, q",
        ),
        ({"only_train_params_name_list": ("head",)}, "--only-train-params-name-list: 'head' matches no parameter"),
        ({"freeze_params_name_list": (".",)}, "--freeze-params-name-list . leaves no parameter to train"),
    ],
)
def test_expressions_must_match_and_leave_something(flags, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**flags).check_trained(["embed", "q"])
    TrainingConfig(only_train_params_name_list=("q",)).check_trained(["embed", "q"])
