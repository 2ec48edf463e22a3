from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.config.sections.logging import LoggingConfig
from qwench.rollout.sample_metrics import (
    describe_rollout,
    is_repetitive,
    pass_at_k,
    pass_rates,
    rollout_metrics,
    sample_metrics,
    speed_metrics,
)
from qwench.samples import Group, Prompt, Sample, Status, Verdict

PROMPT = Prompt(text="pq", token_ids=(1, 2))


def written(reward=1.0, *, length=3, reason="exact", status=Status.COMPLETED, sample_id=0, version=0, **fields):
    sample = Sample(prompt=PROMPT, sample_id=sample_id, group_id=0, status=status, **fields)
    sample.append([5] * length, log_probs=[-0.5] * length, version=version)
    sample.reward, sample.verdict = reward, Verdict(score=reward, reason=reason, extra={"kind": f"k{length}"})
    return sample


def groups_of(*rewards):
    """Return one group for each list of rewards; sample ids count on."""
    ids = iter(range(10**6))
    return [
        Group(group_id=i, samples=[written(reward, sample_id=next(ids)) for reward in of_group])
        for i, of_group in enumerate(rewards)
    ]


def lengths(metrics, name):
    return tuple(metrics[f"{name}/{statistic}"] for statistic in ("mean", "median", "max", "min"))


def test_trained_lengths_stand_beside_response_lengths():
    samples = [written(length=length) for length in (1, 2, 3, 10)]
    samples[3].append([7] * 90, log_probs=None, version=-1)
    assert lengths(sample_metrics(samples), "response_len") == (26.5, 2.5, 100.0, 1.0)
    assert lengths(sample_metrics(samples), "trained_len") == (4.0, 2.5, 10.0, 1.0)


def test_a_sample_that_a_filter_masks_keeps_its_length():
    samples = [written(length=17), written(length=17)]
    samples[1].loss_mask = [0] * 17
    assert lengths(sample_metrics(samples), "response_len") == (17.0, 17.0, 17.0, 17.0)
    assert lengths(sample_metrics(samples), "trained_len") == (8.5, 8.5, 17.0, 0.0)


def test_shares_of_truncation_reasons_and_ungraded_samples():
    samples = [
        written(status=Status.TRUNCATED, reason="no_box"),
        written(reason="exact"),
        written(reason="exact"),
        written(reason="timeout"),
    ]
    metrics = sample_metrics(samples)
    assert metrics["truncated_ratio"] == 0.25
    assert metrics["ungraded"] == 0.25
    assert {name: value for name, value in metrics.items() if "reason" in name} == {
        "reward_reason/exact": 0.5,
        "reward_reason/no_box": 0.25,
        "reward_reason/timeout": 0.25,
    }


def test_each_reward_and_the_cost_of_a_judge_count_over_the_samples_that_have_them():
    samples = [written() for _ in range(4)]
    samples[0].verdict = Verdict(score=1.0, reason="x+y", parts={"math": 1.0, "judge": 0.5})
    samples[1].verdict = Verdict(score=1.0, reason="x+y", parts={"math": 0.0})
    samples[2].verdict = Verdict(score=1.0, reason="judge", extra={"judge_prompt_tokens": 30})
    samples[3].verdict = None
    metrics = sample_metrics(samples)
    found = {name: value for name, value in metrics.items() if name.startswith(("reward/", "judge/"))}
    assert found == {"reward/math": 0.5, "reward/judge": 0.5, "judge/prompt_tokens": 30.0}
    samples[0].verdict = Verdict(score=1.0, reason="judge", extra={"judge_prompt_tokens": 4, "judge_completion_tokens": 5})
    found = {name: value for name, value in sample_metrics(samples).items() if name.startswith("judge/")}
    assert found == {"judge/prompt_tokens": 34.0, "judge/completion_tokens": 5.0}


def test_sizes_of_supports_are_over_the_positions_that_have_one():
    assert not any(name.startswith("support/") for name in sample_metrics([written()]))
    first, second = written(), written()
    first.support, second.support = [[], [5, 6], [5]], [[], [], [5, 6, 7, 8, 9, 10]]
    assert lengths(sample_metrics([first, second]), "support") == (3.0, 2.0, 6.0, 1.0)


def test_prefix_cache_hit_rate_is_over_all_tokens_sent():
    metrics = sample_metrics([written(cached_tokens=30, input_tokens=40), written(cached_tokens=0, input_tokens=20)])
    assert metrics["prefix_cache_hit_rate"] == 0.5
    assert metrics["avg_cached_tokens_per_sample"] == 15.0
    assert sample_metrics([written()])["prefix_cache_hit_rate"] == 0.0


def test_only_long_text_that_compresses_tenfold_is_repetitive():
    assert is_repetitive("again and " * 2000)
    assert not is_repetitive("again and " * 900)
    assert not is_repetitive(" ".join(str(i * i) for i in range(4000)))
    assert sample_metrics([written(response="a" * 20_000), written()])["repetition_frac"] == 0.5


def test_raw_reward_is_the_mean_over_samples():
    assert rollout_metrics(groups_of([1.0, 0.0], [1.0, 1.0]))["rollout/raw_reward"] == 0.75


def test_ungraded_samples_enter_no_rewards():
    groups = groups_of([1.0, 0.0], [0.0, 0.0])
    for sample in (groups[0].samples[1], *groups[1].samples):
        sample.verdict = Verdict(score=0.0, reason="timeout")
    metrics = rollout_metrics(groups)
    assert (metrics["rollout/raw_reward"], metrics["rollout/ungraded"]) == (1.0, 0.75)
    assert metrics["rollout/zero_std/all_zero_percentage"] == 0.0
    assert "rollout/raw_reward" not in rollout_metrics(groups[1:])


def test_groups_without_signal_are_counted_by_their_reward():
    metrics = rollout_metrics(groups_of([0, 0], [0, 0], [1, 1], [0.5, 0.5], [0, 1]))
    assert {name: value for name, value in metrics.items() if "zero_std" in name} == {
        "rollout/zero_std/count_0.0": 2.0,
        "rollout/zero_std/count_0.5": 1.0,
        "rollout/zero_std/count_1.0": 1.0,
        "rollout/zero_std/all_zero_percentage": 0.4,
        "rollout/zero_std/all_one_percentage": 0.2,
    }


def test_weight_version_of_a_sample_is_that_of_its_oldest_trained_token():
    mixed, new = written(version=3), written(version=6, sample_id=1)
    mixed.append([9], log_probs=None, version=-1)
    mixed.append([5], log_probs=[-1.0], version=5)
    metrics = rollout_metrics([Group(group_id=0, samples=[mixed, new])])
    assert {name: value for name, value in metrics.items() if "weight_version" in name} == {
        "rollout/weight_version/mean": 4.5,
        "rollout/weight_version/median": 4.5,
        "rollout/weight_version/max": 6.0,
        "rollout/weight_version/min": 3.0,
        "rollout/weight_version/mixed_version_ratio": 0.5,
    }


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_choices_of_k_with_a_pass(case):
    n, c, k = case
    outcomes = [i < c for i in range(n)]
    assert pass_at_k(n, c, k) == pytest.approx(fmean(any(choice) for choice in combinations(outcomes, k)))


def test_pass_rates_are_powers_of_two_up_to_the_group_size():
    rates = pass_rates(groups_of([1, 0, 0, 0], [1, 1, 1, 1]))
    assert rates == {"pass@1": pytest.approx(0.625), "pass@2": pytest.approx(0.75), "pass@4": 1.0}
    assert pass_rates(groups_of([1], [0])) == {}
    assert set(pass_rates(groups_of([1, 0, 1], [1, 0, 0]))) == {"pass@1", "pass@2"}


def test_siblings_of_one_execution_pass_once():
    samples = [written(r, sample_id=i, execution_id=e) for i, (r, e) in enumerate([(1, 0), (1, 0), (0, 1)])]
    assert pass_rates([Group(group_id=0, samples=samples)]) == {"pass@1": 0.5, "pass@2": 1.0}


def test_speed_is_tokens_over_time_and_gpus():
    masked = written(length=10)
    masked.append([1] * 30, log_probs=None, version=-1)
    assert speed_metrics([masked, written(length=20)], seconds=2.0, num_gpus=3) == {
        "perf/rollout_time": 2.0,
        "perf/tokens_per_gpu_per_sec": 10.0,
        "perf/longest_sample_tokens_per_sec": 20.0,
        "perf/effective_tokens_per_gpu_per_sec": 5.0,
        "perf/longest_effective_sample_tokens_per_sec": 10.0,
    }


def test_optional_metrics_appear_only_when_asked_for():
    groups = groups_of([1, 0])
    groups[0].samples[0].append([1], log_probs=None, version=-1)
    groups[0].samples[0].append([1], log_probs=[-1.0], version=0)
    plain = describe_rollout(groups, LoggingConfig(), seconds=1.0)
    logging = LoggingConfig(log_passrate=True, log_correct_samples=True, log_multi_turn=True, log_reward_category="kind")
    full = describe_rollout(groups, logging, seconds=1.0)
    extra = {name: value for name, value in full.items() if name not in plain}
    assert extra == {
        "rollout/error_cat/k3": 1.0,
        "rollout/correct_response_len/mean": 5.0,
        "rollout/correct_response_len/median": 5.0,
        "rollout/correct_response_len/max": 5.0,
        "rollout/correct_response_len/min": 5.0,
        "rollout/multi_turn/round_number/mean": 1.5,
        "rollout/multi_turn/round_number/median": 1.5,
        "rollout/multi_turn/round_number/max": 2.0,
        "rollout/multi_turn/round_number/min": 1.0,
        "rollout/multi_turn/turn_len/mean": pytest.approx(7 / 3),
        "rollout/multi_turn/turn_len/median": 3.0,
        "rollout/multi_turn/turn_len/max": 3.0,
        "rollout/multi_turn/turn_len/min": 1.0,
        "passrate/pass@1": 0.5,
        "passrate/pass@2": 1.0,
    }
    assert {name: full[name] for name in plain} == plain


@given(st.permutations(range(4)))
def test_order_of_groups_does_not_matter(order):
    groups = groups_of([0, 1], [1, 1], [0, 0], [1, 0])
    assert rollout_metrics([groups[i] for i in order]) == pytest.approx(rollout_metrics(groups))


def test_pass_rates_go_up_to_the_smallest_group():
    rates = pass_rates(groups_of([1.0, 0.0], [1.0, 0.0, 0.0, 1.0]))
    assert rates == {"pass@1": 0.5, "pass@2": pytest.approx((1.0 + 5 / 6) / 2)}
    assert pass_rates(groups_of([1.0], [1.0, 0.0])) == {}


def test_a_text_as_long_as_the_window_is_not_yet_repetitive():
    assert not is_repetitive("a" * 10_000)
    assert is_repetitive("a" * 10_001)


def test_without_tokens_sent_nothing_was_cached_and_an_engine_on_a_cpu_counts_as_one_gpu():
    assert sample_metrics([written()])["prefix_cache_hit_rate"] == 0.0
    assert speed_metrics([written(length=6)], seconds=3.0, num_gpus=0)["perf/tokens_per_gpu_per_sec"] == 2.0


def test_a_sample_without_tokens_of_the_policy_has_no_weight_version():
    empty = written(length=0, sample_id=1)
    metrics = rollout_metrics([Group(group_id=0, samples=[written(version=4), empty])])
    assert (metrics["rollout/weight_version/min"], metrics["rollout/weight_version/mean"]) == (4.0, 4.0)
    only_empty = rollout_metrics([Group(group_id=0, samples=[empty])])
    assert not [name for name in only_empty if "weight_version" in name]
