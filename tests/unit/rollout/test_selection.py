"""How finished groups are sorted, and what a rollout says of those that are not trained on."""

from __future__ import annotations

import pytest

from qwench.errors import QwenchError
from qwench.rollout.filters import KEEP, FilterResult
from qwench.rollout.functions import RolloutFunctions
from qwench.rollout.selection import Selection, Tally, reward_shares
from qwench.samples import Group, Prompt, Sample, Status, Verdict


def group_of(group_id: int, *rewards: float, status: Status = Status.COMPLETED) -> Group:
    samples = []
    for i, reward in enumerate(rewards):
        prompt = Prompt(text=str(group_id), token_ids=(1,))
        sample = Sample(prompt=prompt, sample_id=10 * group_id + i, group_id=group_id, status=status, reward=reward)
        sample.verdict = Verdict(score=reward, reason="exact")
        sample.append([5], log_probs=[-1.0], version=0)
        samples.append(sample)
    return Group(group_id=group_id, samples=samples)


class Measuring:
    """A curriculum that notes what it measures."""

    def __init__(self) -> None:
        self.measured: list[int] = []

    def measure(self, groups: list[Group]) -> None:
        self.measured += [group.group_id for group in groups]

    def take_metrics(self) -> dict[str, float]:
        return {"rollout/curriculum": 1.0}


def by_reward(group: Group) -> FilterResult:
    total = sum(group.rewards)
    if total == 1.0:
        return KEEP
    return FilterResult(keep=False, reason=f"sum_{total:g}", keep_when_insufficient=total == 2.0)


def test_groups_are_sorted_by_filter_need_and_status_and_each_outcome_is_counted():
    seen: list[list[int]] = []
    functions = RolloutFunctions(
        group_filter=by_reward, on_all_groups=lambda groups: seen.append([group.group_id for group in groups])
    )
    curriculum = Measuring()
    selection, tally = Selection(functions, curriculum), Tally(rounds=3)
    cases = [
        (group_of(5, 1.0, 0.0), False, True),
        (group_of(3, 1.0, 1.0), False, False),
        (group_of(4, 0.0, 0.0), True, False),
        (group_of(2, 1.0, 1.0), True, True),
        (group_of(1, 1.0, 0.0, status=Status.ABORTED), True, False),
    ]
    assert [selection.judge(group, tally, is_needed=needed) for group, needed, _ in cases] == [kept for *_, kept in cases]
    tally.surplus = [group_of(0, 1.0), group_of(9, 1.0, status=Status.ABORTED)]
    rollout = selection.finish(7, tally)
    assert (rollout.rollout_id, [group.group_id for group in rollout.groups]) == (7, [2, 5])
    assert [group.group_id for group in tally.unusable] == [1]
    assert seen == [[0, 2, 3, 4, 5]] and curriculum.measured == [5, 2, 3, 4]
    assert rollout.metrics == {
        "rollout/dynamic_filter/drop_aborted": 1.0,
        "rollout/dynamic_filter/drop_sum_0": 1.0,
        "rollout/dynamic_filter/drop_sum_2": 1.0,
        "rollout/surplus_groups": 2.0,
        "rollout/dynamic_filter/all_zero_share": 0.25,
        "rollout/dynamic_filter/all_one_share": 0.5,
        "rollout/dynamic_filter/rounds": 3.0,
        "rollout/curriculum": 1.0,
    }
    assert list(rollout.metrics)[:3] == [f"rollout/dynamic_filter/drop_{why}" for why in ("aborted", "sum_0", "sum_2")]
    plain, tally = Selection(RolloutFunctions()), Tally()
    assert plain.judge(group_of(1, 0.0), tally) and plain.finish(0, tally).metrics == {"rollout/surplus_groups": 0.0}


def test_samples_that_a_function_removes_or_nobody_graded_are_masked():
    group = group_of(1, 1.0, 1.0, 1.0, 1.0)
    group.samples[0].verdict = Verdict(score=0.0, reason="timeout")
    functions = RolloutFunctions(
        sample_filter=lambda sample, group: sample is not group.samples[1],
        find_removed=lambda groups: [groups[0].samples[2]],
    )
    rollout = Selection(functions).finish(0, Tally(accepted=[group]))
    assert [sum(sample.loss_mask) for sample in rollout.samples] == [0, 0, 0, 1]
    rollout = Selection(RolloutFunctions()).finish(0, Tally(accepted=[group_of(1, 1.0, 0.0)]))
    assert [sum(sample.loss_mask) for sample in rollout.samples] == [1, 1], "without a filter all are trained on"


def test_filters_answer_in_their_own_form():
    for functions, message in (
        (RolloutFunctions(group_filter=lambda group: True), "path must return a FilterResult, got True"),
        (RolloutFunctions(sample_filter=lambda sample, group: "no"), "path must return true or false, got 'no'"),
    ):
        selection, tally = Selection(functions), Tally()
        with pytest.raises(QwenchError, match=message):
            selection.judge(group_of(1, 1.0), tally)
            selection.finish(0, tally)


def test_shares_of_no_groups_are_zero():
    assert reward_shares([]) == (0.0, 0.0)
    assert reward_shares([group_of(0, 0.0), group_of(1, 1.0), group_of(2, 1.0, 0.0)]) == pytest.approx((1 / 3, 1 / 3))
    assert reward_shares([group_of(0, 0.0)]) == (1.0, 0.0)
    assert reward_shares([group_of(0, 1.0)]) == (0.0, 1.0)
