from dataclasses import fields

import pytest

from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.errors import ConfigError
from qwench.estimators import METHODS, check_estimator, estimator_names, method_name, owners_of


def test_ppo_and_the_reinforce_methods_use_the_kl_of_tokens_and_the_latter_require_whitening():
    assert {name for name, facts in METHODS.items() if facts.token_kl} == {
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "ppo",
    }
    assert {name for name, facts in METHODS.items() if facts.requires_whitening} == {
        name for name, facts in METHODS.items() if facts.token_kl and not facts.critic
    }


@pytest.mark.parametrize(
    ("fact", "without"),
    [
        ("compares_groups", {"reinforce_plus_plus", "ppo", "sft"}),
        (
            "divides_by_std",
            {"reinforce_plus_plus", "reinforce_plus_plus_baseline", "rloo", "dr_grpo", "gpg", "maxrl", "ppo", "sft"},
        ),
        ("clips", {"sapo", "gpg", "kl_cov"}),
        ("clips_loss", {"cispo", "sapo", "gmpo", "gpg", "kl_cov", "dppo_tv", "dppo_kl"}),
        ("reduces", {"dr_grpo"}),
        ("policy_gradient", {"sft"}),
    ],
)
def test_which_methods_lack_a_fact_that_most_have(fact, without):
    assert {name for name, facts in METHODS.items() if not getattr(facts, fact)} == without


def test_which_methods_discount_and_which_has_a_critic():
    assert {name for name, facts in METHODS.items() if facts.discounts} == {"reinforce_plus_plus", "ppo"}
    assert {name for name, facts in METHODS.items() if facts.critic} == {"ppo"}


@pytest.mark.parametrize(
    ("name", "flags", "needed"),
    [
        ("grpo", {"use_kl_loss": False, "kl_coef": 0.0}, False),
        ("grpo", {"use_kl_loss": True, "kl_coef": 0.0}, True),
        ("grpo", {"use_kl_loss": False, "kl_coef": 0.1}, False),
        ("reinforce_plus_plus", {"use_kl_loss": False, "kl_coef": 1.0}, True),
        ("reinforce_plus_plus", {"use_kl_loss": False, "kl_coef": 0.0}, False),
        ("sft", {"use_kl_loss": True, "kl_coef": 0.1}, False),
    ],
)
def test_a_reference_is_needed_where_a_kl_has_an_effect(name, flags, needed):
    assert METHODS[name].needs_reference(**flags) == needed


def test_a_field_of_one_method_is_an_option_of_no_other():
    own = {
        "dr_grpo": {"dr_grpo_length"},
        "sapo": {"sapo_tau_pos", "sapo_tau_neg"},
        "clip_cov": {"clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"},
        "kl_cov": {"kl_cov_ratio", "kl_cov_coef"},
    }
    named = {item.name for item in fields(AlgorithmConfig) if item.name.startswith(tuple(own))}
    assert {name: set(facts.options) & named for name, facts in METHODS.items() if set(facts.options) & named} == own
    assert {option: owners_of(option) for option in named} == {option: [name] for name in own for option in own[name]}
    assert {option: owners_of(option) for option in ("lambd", "value_clip")} == {"lambd": ["ppo"], "value_clip": ["ppo"]}


def test_loss_type_and_estimator_choose_the_method():
    assert [method_name(loss_type, "cispo") for loss_type in ("policy_loss", "custom_loss")] == ["cispo", "cispo"]
    assert method_name("sft_loss", "cispo") == "sft"
    with pytest.raises(
        ConfigError, match=r"--loss-type 'no_loss' cannot be trained; known: policy_loss, sft_loss, custom_loss\.$"
    ):
        method_name("no_loss", "grpo")


def test_an_unknown_name_lists_the_known_ones():
    known = (
        "grpo, gspo, cispo, reinforce_plus_plus, reinforce_plus_plus_baseline, rloo, dr_grpo, sapo, gmpo, gpg, clip_cov, "
        "kl_cov, dppo_tv, dppo_kl, maxrl, passk, gdpo, ppo"
    )
    for loss_type in ("policy_loss", "custom_loss"):
        with pytest.raises(ConfigError, match=rf"unknown --advantage-estimator 'grp0'; known: {known}\.$"):
            method_name(loss_type, "grp0")


def test_sft_is_no_estimator():
    assert "sft" not in estimator_names()
    with pytest.raises(ConfigError, match="unknown --advantage-estimator 'sft'"):
        check_estimator("sft")
