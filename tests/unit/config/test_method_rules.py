"""Rules of methods that contradict each other."""

import pytest

from qwench.config.config import Config
from qwench.config.rules import check_rules
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.rollout import RolloutConfig
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
