import math
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.method import Needs
from qwench.algorithms.methods import build_method
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.estimators import METHODS


def _batch(rewards, *, group_ids=None, graded=None, response_lengths=None, **columns):
    response_lengths = response_lengths or [2] * len(rewards)
    return RolloutBatch(
        tokens=[torch.arange(length + 1) for length in response_lengths],
        loss_mask=[torch.ones(length, dtype=torch.bool) for length in response_lengths],
        rewards=torch.tensor(rewards),
        graded=torch.tensor(graded or [True] * len(rewards)),
        group_ids=torch.tensor(group_ids or [0] * len(rewards)),
        execution_ids=torch.arange(len(rewards)),
        **columns,
    )


def _advantages(batch, config):
    return build_method(config).targets(batch)["advantages"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, 0.5 / (math.sqrt(0.5) + 1e-6)),
        ({"advantage_estimator": "gspo"}, 0.5 / (math.sqrt(0.5) + 1e-6)),
        ({"advantage_estimator": "cispo"}, 0.5 / (math.sqrt(0.5) + 1e-6)),
        ({"disable_grpo_std_normalization": True}, 0.5),
        ({"advantage_estimator": "reinforce_plus_plus_baseline", "normalize_advantages": True}, 0.5),
    ],
)
def test_rewards_are_compared_within_their_group(flags, expected):
    got = build_method(AlgorithmConfig(**flags)).rewards(_batch([1.0, 0.0]))
    assert got.tolist() == pytest.approx([expected, -expected])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"disable_grpo_std_normalization": True}, [0.5, -0.5, 0.5]), ({"advantage_estimator": "maxrl"}, [1.0, -1.0, 1.0])],
)
def test_rewards_of_samples_are_compared_with_those_of_executions(flags, expected):
    # Three samples of two executions, with the scores 1 and 0.
    method = build_method(AlgorithmConfig(**flags))
    assert method.compare(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0])).tolist() == pytest.approx(expected)


def test_ungraded_sample_is_not_part_of_its_group():
    got = build_method(AlgorithmConfig()).rewards(_batch([1.0, 0.0, 0.0], graded=[True, True, False]))
    assert got.tolist() == pytest.approx([0.5 / (math.sqrt(0.5) + 1e-6), -0.5 / (math.sqrt(0.5) + 1e-6), 0.0])


@pytest.mark.parametrize(
    "flags",
    [{"disable_rewards_normalization": True}, {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True}],
)
def test_raw_rewards_where_the_flags_or_the_estimator_say_so(flags):
    assert build_method(AlgorithmConfig(**flags)).rewards(_batch([1.0, 0.0])).tolist() == [1.0, 0.0]


def test_grpo_gives_each_token_its_samples_reward():
    got = _advantages(_batch([0.5, -2.0], response_lengths=[1, 3]), AlgorithmConfig())
    assert [column.tolist() for column in got] == [[0.5], [-2.0, -2.0, -2.0]]


def test_advantages_fall_by_what_a_token_is_likelier_to_the_policy_than_to_the_teacher():
    columns = {"old_log_probs": [torch.tensor([-1.0, -2.0])], "teacher_log_probs": [torch.tensor([-1.5, -1.0])]}
    got = build_method(AlgorithmConfig(), opd_kl_coef=0.5).targets(_batch([1.0], **columns))["advantages"]
    assert [column.tolist() for column in got] == [[1.0 - 0.5 * 0.5, 1.0 + 0.5 * 1.0]]


def test_whitening_on_request():
    got = torch.cat(_advantages(_batch([1.0, 3.0], response_lengths=[1, 1]), AlgorithmConfig(normalize_advantages=True)))
    assert got.tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)], rel=1e-6)


def test_reinforce_plus_plus_discounts_reward_and_token_kl_before_whitening():
    config = AlgorithmConfig(
        advantage_estimator="reinforce_plus_plus", normalize_advantages=True, kl_coef=0.5, gamma=0.25, kl_loss_type="k1"
    )
    columns = {"old_log_probs": [torch.tensor([-1.0, -2.0, -3.0])], "ref_log_probs": [torch.tensor([-2.0, -1.0, -3.0])]}
    # KL 1, -1, 0: token rewards -0.5, 0.5, 1; returns -0.5 + 0.75 / 4, 0.5 + 1 / 4, 1.
    returns = [-0.3125, 0.75, 1.0]
    got = _advantages(_batch([1.0], response_lengths=[3], **columns), config)[0].tolist()
    assert got == pytest.approx([(one - mean(returns)) / stdev(returns) for one in returns], rel=1e-5)


def test_baseline_takes_the_engines_log_probs_as_the_old_policys_when_told_to():
    config = AlgorithmConfig(
        advantage_estimator="reinforce_plus_plus_baseline", normalize_advantages=True, kl_coef=1.0, use_rollout_logprobs=True
    )
    batch = _batch([0.0], rollout_log_probs=[torch.tensor([-1.0, -2.0])], ref_log_probs=[torch.tensor([-1.0, -1.0])])
    # KL 0, -1: advantages 0, 1.
    assert _advantages(batch, config)[0].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)], rel=1e-6)


def test_every_method_has_its_file():
    for name in METHODS:
        loss_type = "sft_loss" if name == "sft" else "policy_loss"
        whitened = METHODS[name].requires_whitening
        section = AlgorithmConfig(
            loss_type=loss_type, advantage_estimator="grpo" if name == "sft" else name, normalize_advantages=whitened
        )
        assert type(build_method(section)).__module__ == f"qwench.algorithms.methods.{name}"


def test_supervised_fine_tuning_needs_nothing_and_has_no_targets():
    method = build_method(AlgorithmConfig(loss_type="sft_loss"))
    assert method.needs(num_steps=4) == Needs()
    assert method.targets(_batch([1.0])) == {}


@pytest.mark.parametrize(
    ("flags", "num_steps", "needs"),
    [
        ({}, 1, Needs()),
        ({}, 2, Needs(old_log_probs=True)),
        (
            {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True, "kl_coef": 0.1},
            1,
            Needs(old_log_probs=True),
        ),
        ({"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True}, 1, Needs()),
        ({"use_rollout_logprobs": True}, 2, Needs(rollout_log_probs=("--use-rollout-logprobs",))),
        ({"use_tis": True}, 1, Needs(rollout_log_probs=("--use-tis",))),
        ({"get_mismatch_metrics": True}, 1, Needs(old_log_probs=True, rollout_log_probs=("--get-mismatch-metrics",))),
        ({"entropy_coef": 0.1}, 1, Needs(entropy=True)),
        ({"observe_training_entropy": True}, 1, Needs(entropy=True)),
        *(({"advantage_estimator": name}, 1, Needs(old_log_probs=True)) for name in ("gspo", "clip_cov", "kl_cov")),
    ],
)
def test_a_method_needs_what_its_flags_compare(flags, num_steps, needs):
    said = build_method(AlgorithmConfig(**flags)).needs(num_steps=num_steps)
    assert replace(said, rollout_log_probs=tuple(said.rollout_log_probs)) == needs
