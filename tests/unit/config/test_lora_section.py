"""Which projections have adapters, and at which scale they are added."""

import pytest

from qwench.config.sections.lora import LoraConfig
from qwench.errors import ConfigError
from qwench.models.architecture import PROJECTIONS


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (None, None, PROJECTIONS),
        ("all-linear", None, PROJECTIONS),
        ("down_proj, q_proj", None, ("q_proj", "down_proj")),
        ("linear_qkv,linear_proj", None, ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("linear_fc1,linear_fc2", "up_proj", ("gate_proj", "down_proj")),
        (None, "linear_qkv,linear_fc1", ("o_proj", "down_proj")),
    ],
)
def test_projections_are_named_as_in_peft_and_as_in_megatron(target, exclude, expected):
    assert LoraConfig(lora_rank=1, target_modules=target, exclude_modules=exclude).targets == expected


def test_the_scale_falls_with_the_rank_or_with_its_root():
    assert LoraConfig(lora_rank=4, lora_alpha=8.0).scale == 2.0
    assert LoraConfig(lora_rank=4, lora_alpha=8.0, use_rslora=True).scale == 4.0
    assert LoraConfig(lora_rank=4).scale == LoraConfig(lora_rank=4, lora_alpha=16.0).scale == 4.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": -1}, "--lora-rank must not be negative"),
        ({"lora_rank": 1, "lora_alpha": 0.0}, "--lora-alpha must be greater than 0"),
        ({"lora_rank": 1, "lora_dropout": 1.0}, "--lora-dropout must be at least 0 and less than 1, got 1.0"),
        (
            {"lora_rank": 1, "target_modules": "lm_head"},
            "unknown name 'lm_head' in --target-modules; known: all-linear",
        ),
        (
            {"lora_rank": 1, "target_modules": "q_proj", "exclude_modules": "linear_qkv"},
            "--exclude-modules linear_qkv leaves no projection",
        ),
        ({"target_modules": "q_proj"}, "--target-modules has no effect without adapters; give --lora-rank"),
        ({"use_rslora": True}, "--use-rslora has no effect without adapters"),
        ({"lora_alpha": 16.0}, "--lora-alpha has no effect without adapters; give --lora-rank, or leave it out"),
        ({"lora_dropout": 0.1}, "--lora-dropout has no effect without adapters; give --lora-rank, or leave it out"),
        ({"lora_rank": 0, "lora_init": "pissa"}, "--lora-init has no effect without adapters"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**fields)
    assert str(caught.value).startswith(message)


def test_a_script_may_switch_adapters_off_by_their_rank_alone():
    assert not LoraConfig(lora_rank=0, lora_alpha=32.0, lora_dropout=0.1).enabled
    assert not LoraConfig().enabled


def test_principal_components_are_of_weights_that_are_not_quantised():
    with pytest.raises(ConfigError, match="--lora-base nf4 does not work with --lora-init pissa; choose kaiming"):
        LoraConfig(lora_rank=4, lora_base="nf4", lora_init="pissa")
