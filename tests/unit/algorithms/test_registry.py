import pytest

from qwench.algorithms.registry import ESTIMATORS, Ratio, RewardScale, Surrogate, find_estimator
from qwench.config.sections.algorithm import SAMPLE_ESTIMATORS
from qwench.errors import ConfigError


def test_grpo_gspo_and_cispo_differ_only_in_ratio_and_surrogate():
    grpo, gspo, cispo = (find_estimator(name) for name in ("grpo", "gspo", "cispo"))
    assert (grpo.reward_scale, gspo.reward_scale, cispo.reward_scale) == (RewardScale.STANDARDIZED,) * 3
    assert (grpo.ratio, gspo.ratio, cispo.ratio) == (Ratio.TOKEN, Ratio.SEQUENCE, Ratio.TOKEN)
    assert (grpo.surrogate, gspo.surrogate, cispo.surrogate) == (Surrogate.PPO_CLIP, Surrogate.PPO_CLIP, Surrogate.CISPO)


def test_only_the_reinforce_estimators_use_token_kl_and_whitening():
    users = {name for name, estimator in ESTIMATORS.items() if estimator.uses_token_kl and estimator.needs_whitening}
    assert users == {"reinforce_plus_plus", "reinforce_plus_plus_baseline"}


def test_the_flags_that_only_token_kl_uses_are_refused_for_all_others():
    assert set(SAMPLE_ESTIMATORS) == {name for name, estimator in ESTIMATORS.items() if not estimator.uses_token_kl}


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown --advantage-estimator 'grp0'; known: grpo, gspo, cispo"):
        find_estimator("grp0")


def test_ppo_is_refused_for_want_of_a_critic():
    with pytest.raises(ConfigError, match="needs a critic"):
        find_estimator("ppo")
