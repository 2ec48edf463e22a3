from statistics import stdev

import pytest

from qwench.config.config import Config
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.launch.user_functions import load_user_functions
from qwench.rollout import filters
from qwench.rollout.filters import check_no_aborted, check_parts_nonzero_std, check_reward_nonzero_std, reward_label
from qwench.samples import Status, Verdict
from tests.unit.rollout.scene import group


def graded(*rewards):
    of_rewards = group(size=len(rewards))
    for sample, reward in zip(of_rewards.samples, rewards, strict=True):
        sample.verdict, sample.reward, sample.status = Verdict(score=reward, reason="x"), reward, Status.COMPLETED
    return of_rewards


def of_parts(group, *scores):
    for sample, math in zip(group.samples, scores, strict=True):
        sample.verdict = Verdict(score=1.0, reason="x+y", parts={"math": math, "judge": 1 - math})
    return group


def test_group_with_different_rewards_is_kept():
    assert check_reward_nonzero_std(graded(0.0, 1.0)).keep


@pytest.mark.parametrize(("reward", "reason"), [(0.0, "zero_std_0.0"), (1.0, "zero_std_1.0"), (0.25, "zero_std_0.2")])
def test_group_with_equal_rewards_is_dropped_by_the_name_of_its_reward(reward, reason):
    result = check_reward_nonzero_std(graded(reward, reward, reward))
    assert (result.keep, result.reason) == (False, reason)


def test_threshold_is_a_sample_standard_deviation_of_1e_6():
    # Two rewards d apart have the sample standard deviation d / sqrt(2).
    assert not check_reward_nonzero_std(graded(1.0, 1.0 + 1.4e-6)).keep
    assert check_reward_nonzero_std(graded(1.0, 1.0 + 1.5e-6)).keep


def test_a_deviation_at_the_threshold_is_none(monkeypatch):
    monkeypatch.setattr(filters, "MIN_STD", stdev([1.0, 4.0]))
    assert not check_reward_nonzero_std(graded(1.0, 4.0)).keep
    assert not check_parts_nonzero_std(of_parts(graded(1.0, 1.0), 1.0, 4.0)).keep


def test_a_group_of_equal_rewards_is_kept_by_the_fallback_where_groups_lack():
    dropped = filters.check_reward_nonzero_std_with_fallback(graded(1.0, 1.0))
    assert (dropped.keep, dropped.reason, dropped.keep_when_insufficient) == (False, "zero_std_1.0", True)
    assert filters.check_reward_nonzero_std_with_fallback(graded(0.0, 1.0)).keep


def test_single_sample_has_no_deviation():
    assert not check_reward_nonzero_std(graded(1.0)).keep


def test_zero_of_an_ungraded_sample_makes_no_difference():
    ones = graded(1.0, 1.0, 0.0)
    ones.samples[2].verdict = Verdict(score=0.0, reason="timeout")
    assert not ones.samples[2].graded
    assert check_reward_nonzero_std(ones).reason == "zero_std_1.0"
    for sample in ones.samples:
        sample.verdict = Verdict(score=0.0, reason="grader_error")
    assert check_reward_nonzero_std(ones).reason == "ungraded"


def test_equal_sums_of_rewards_that_differ_are_kept_where_they_are_compared_apart():
    """GDPO compares each reward apart: (1, 0) and (0, 1) have the sum 1, and both rewards teach."""
    several = of_parts(graded(1.0, 1.0), 1.0, 0.0)
    assert check_parts_nonzero_std(several).keep
    assert not check_reward_nonzero_std(several).keep
    several.samples[1].verdict = several.samples[0].verdict
    assert check_parts_nonzero_std(several).reason == "zero_std_1.0"
    several.samples[1].verdict = Verdict(score=1.0, reason="custom")
    assert check_parts_nonzero_std(several).reason == "zero_std_1.0"
    several.samples[1].verdict = Verdict(score=1.0, reason="timeout", parts={"math": 0.0})
    assert check_parts_nonzero_std(several).reason == "zero_std_1.0", "what nobody graded makes no difference"
    several.samples[1].verdict = Verdict(score=1.0, reason="x+y", parts={"math": 1.0, "judge": 1.0})
    assert check_parts_nonzero_std(several).keep, "one of them differs"


@pytest.mark.parametrize(("estimator", "keeps"), [("gdpo", True), ("grpo", False)])
def test_the_flag_means_the_parts_for_gdpo(estimator, keeps):
    path = "qwench.rollout.filters.check_reward_nonzero_std"
    rollout, algorithm = RolloutConfig(dynamic_sampling_filter_path=path), AlgorithmConfig(advantage_estimator=estimator)
    several = graded(1.0, 1.0)
    for sample, math in zip(several.samples, (1.0, 0.0), strict=True):
        sample.verdict = Verdict(score=1.0, reason="x+y", parts={"math": math, "judge": 1 - math})
    functions = load_user_functions(Config(rollout=rollout, algorithm=algorithm)).rollout
    assert functions.group_filter is not None and functions.group_filter(several).keep is keeps


def test_group_with_an_aborted_sample_is_dropped():
    aborted = graded(0.0, 1.0)
    assert check_no_aborted(aborted).keep
    aborted.samples[1].status = Status.ABORTED
    assert (check_no_aborted(aborted).keep, check_no_aborted(aborted).reason) == (False, "aborted")


def test_reward_label_has_one_decimal_and_no_negative_zero():
    assert [reward_label(reward) for reward in (0, 1, -1.0, 0.05, -0.01)] == ["0.0", "1.0", "-1.0", "0.1", "0.0"]
