import pytest

from qwench.rollout.filters import check_no_aborted, check_reward_nonzero_std, reward_label
from qwench.samples import Status, Verdict
from tests.unit.rollout.scene import group


def graded(*rewards):
    of_rewards = group(size=len(rewards))
    for sample, reward in zip(of_rewards.samples, rewards, strict=True):
        sample.verdict, sample.reward, sample.status = Verdict(score=reward, reason="x"), reward, Status.COMPLETED
    return of_rewards


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


def test_group_with_an_aborted_sample_is_dropped():
    aborted = graded(0.0, 1.0)
    assert check_no_aborted(aborted).keep
    aborted.samples[1].status = Status.ABORTED
    assert (check_no_aborted(aborted).keep, check_no_aborted(aborted).reason) == (False, "aborted")


def test_reward_label_has_one_decimal_and_no_negative_zero():
    assert [reward_label(reward) for reward in (0, 1, -1.0, 0.05, -0.01)] == ["0.0", "1.0", "-1.0", "0.1", "0.0"]
