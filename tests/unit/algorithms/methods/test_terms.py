"""Terms of the policy loss that flags and functions of the user change, with values worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.method import Corrected, Needs, UserTerms
from qwench.algorithms.methods import build_method
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.training.batch import pack

NEW = torch.tensor([-1.0, 7.0, -2.0, 9.0])
"""Log-probs of the policy, label-aligned; the old ones are the same where a token is trained on."""


def batch_of(masks=((True, False, True),), **columns):
    """Return samples of a prompt of one token each."""
    made = RolloutBatch(
        tokens=[torch.arange(len(mask) + 1) for mask in masks],
        loss_mask=[torch.tensor(mask) for mask in masks],
        rewards=torch.zeros(len(masks)),
        graded=torch.ones(len(masks), dtype=torch.bool),
        group_ids=torch.zeros(len(masks), dtype=torch.int64),
        execution_ids=torch.arange(len(masks)),
    )
    return made.with_columns(**{name: [torch.tensor(one) for one in column] for name, column in columns.items()})


def step_of(**columns):
    """Return one packed sample whose losses are -1 and -3."""
    usual = {"old_log_probs": [[-1.0, 0.0, -2.0]], "advantages": [[1.0, 9.0, 3.0]], "loss_weights": [[0.5, 0.0, 0.5]]}
    return pack(batch_of(**{**usual, **columns}), [0])


def values_of(metrics):
    return {name: float(value) for name, value in metrics.items()}


def test_a_reduction_of_the_user_replaces_the_mean_of_the_policy_loss_alone():
    seen = []

    def reduce(loss, kept, micro_batch):
        seen.append(kept.tolist())
        return 10 * loss[kept].sum()

    method = build_method(AlgorithmConfig(entropy_coef=0.5), user_terms=UserTerms(reduce=reduce))
    made = method.loss(NEW, torch.full((4,), 2.0), step_of(step_share=[[0.25] * 3]))
    # 10 x (-1 - 3) x 0.25, and the entropy 2 with the coefficient 0.5
    assert (seen, float(made.loss)) == ([[True, False, True, False]], -11.0)
    assert values_of(made.metrics) == {"pg_clipfrac": 0.0, "ppo_kl": 0.0, "pg_loss": -10.0, "entropy_loss": 2.0}


def test_a_correction_of_the_user_replaces_the_importance_weights():
    asked = []

    def correct(loss, trainer, rollout, micro_batch):
        asked.extend([loss.tolist(), trainer.tolist(), rollout.tolist()])
        return Corrected(loss=2 * loss, kept=torch.tensor([True, True, False, True]), metrics={"mine": torch.full((4,), 3.0)})

    method = build_method(AlgorithmConfig(use_tis=True), user_terms=UserTerms(correct=correct))
    made = method.loss(NEW, None, step_of(rollout_log_probs=[[-1.5, 0.0, -4.0]]))
    assert asked == [[-1.0, 0.0, -3.0, 0.0], [-1.0, 0.0, -2.0, 0.0], [-1.5, 0.0, -4.0, 0.0]]
    assert float(made.loss) == -1.0 and values_of(made.metrics)["mine"] == 3.0


@pytest.mark.parametrize(
    ("fresh", "gap", "drift", "peak"), [([0.0, 0.0, 0.5], 0.5, 0.5, 2.0), ([0.5, 0.0, 0.0], 0.125, 2.0, 0.5)]
)
def test_the_gap_to_the_engine_is_that_of_tokens_of_the_current_weights(fresh, gap, drift, peak):
    """The differences are 0.5 and 2."""
    stale = [2.0 * (one == 0.0) for one in fresh]
    micro_batch = step_of(rollout_log_probs=[[-1.5, 0.0, -4.0]], fresh_scale=[fresh], stale_scale=[stale])
    made = build_method(AlgorithmConfig()).loss(NEW, None, micro_batch)
    assert values_of(made.peaks) == {"train_rollout_logprob_abs_diff_max": peak}
    metrics = values_of(made.metrics)
    assert (metrics["train_rollout_logprob_abs_diff"], metrics["rollout_drift_logprob_abs_diff"]) == (gap, drift)


@pytest.mark.parametrize(
    ("flags", "mean"),
    [
        ({"tis_clip": 2.0}, 5 / 3),  # weights 1, 2, 2
        ({"tis_clip": 0.5}, 0.5),
        ({"tis_clip": 3.0, "tis_level": "sequence", "tis_mode": "clip"}, 2.5),  # 1 x 3 and 2, of one sequence each
        ({"tis_clip": 2.5, "tis_mode": "icepop"}, 1.0),  # 1, 0, 2
        ({"tis_clip": 0.5, "tis_mode": "icepop"}, 1.0),  # nothing is within the bounds, and nothing is divided by 0
    ],
)
def test_importance_weights_of_a_step_may_have_the_mean_one(flags, mean):
    method = build_method(AlgorithmConfig(use_tis=True, tis_batch_normalize=True, **flags))
    logs = [[0.0, 9.0, math.log(3.0)], [math.log(2.0)]]  # ratios 1, 3 and 2; the second token is not trained on
    zeros = [[0.0] * 3, [0.0]]
    columns = method.step_columns(batch_of(((True, False, True), (True,)), old_log_probs=logs, rollout_log_probs=zeros))
    assert [one.tolist() for one in columns["importance_scale"]] == [
        pytest.approx([1 / mean] * 3),
        pytest.approx([1 / mean]),
    ]


def test_normalised_importance_weights_weigh_the_loss():
    gap = [[-1.0 - math.log(3.0), 0.0, -2.0]]  # ratios 3, which is cut at 2, and 1
    method = build_method(AlgorithmConfig(use_tis=True, tis_batch_normalize=True, tis_clip=2.0))
    made = method.loss(NEW, None, step_of(rollout_log_probs=gap, importance_scale=[[0.5] * 3]))
    assert float(made.loss) == pytest.approx(0.5 * (-1 * 2 - 3 * 1) * 0.5)
    assert values_of(made.metrics)["tis_normalized"] == pytest.approx(0.75)
    assert "tis_normalized" not in method.loss(NEW, None, step_of(rollout_log_probs=gap)).metrics


def test_the_bounds_of_masked_importance_weights_are_measured():
    gap = [[-1.0 - math.log(3.0), 0.0, -2.0 + math.log(3.0)]]
    flags = {"tis_mode": "mask", "tis_clip": 2.0, "tis_lower_bound": 0.5}
    for use, losses in (({"use_tis": True}, 0.0), ({"get_mismatch_metrics": True}, -2.0)):
        made = build_method(AlgorithmConfig(**flags, **use)).loss(NEW, None, step_of(rollout_log_probs=gap))
        metrics = values_of(made.metrics)
        assert (float(made.loss), metrics["tis_low_fraction"], metrics["tis_high_fraction"]) == (losses, 0.5, 0.5)


@pytest.mark.parametrize("bounds", [{"tis_lower_bound": 1.0, "tis_clip": 2.0}, {"tis_lower_bound": 0.5, "tis_clip": 1.0}])
def test_a_ratio_at_a_bound_is_within_it(bounds):
    flags = {"use_tis": True, "tis_mode": "mask", "use_rs": True, **bounds}
    made = build_method(AlgorithmConfig(**flags)).loss(NEW, None, step_of(rollout_log_probs=[[-1.0, 0.0, -2.0]]))
    metrics = values_of(made.metrics)
    assert [metrics[name] for name in ("tis_low_fraction", "tis_high_fraction", "rs_fraction")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("flags", "rest", "num_steps", "needs"),
    [
        ({"skip_actor_forward_only": True}, {}, 2, Needs()),
        ({"use_rs": True}, {}, 1, Needs(rollout_log_probs=["--use-rs"])),
        (
            {"use_tis": True, "tis_batch_normalize": True},
            {},
            1,
            Needs(old_log_probs=True, rollout_log_probs=["--use-tis"]),
        ),
        ({}, {"opd_kl_coef": 0.5}, 1, Needs(old_log_probs=True)),
        ({"use_tis": True}, {"user_terms": UserTerms(loss=lambda *words: NEW)}, 1, Needs(old_log_probs=True)),
        ({"use_rollout_logprobs": True}, {"user_terms": UserTerms(loss=lambda *words: NEW)}, 2, Needs()),
    ],
)
def test_what_a_run_scores_before_its_steps(flags, rest, num_steps, needs):
    method = build_method(AlgorithmConfig(**flags), **rest)
    scored = method.needs(num_steps=num_steps)
    assert replace(scored, rollout_log_probs=list(scored.rollout_log_probs)) == replace(
        needs, rollout_log_probs=list(needs.rollout_log_probs)
    )


def test_a_teacher_that_was_asked_for_its_likeliest_tokens_is_followed_by_their_divergence():
    batch = batch_of(((True, True),), old_log_probs=[[-1.0, -2.0]], teacher_log_probs=[[0.0, 0.0]], teacher_kl=[[0.5, -1.0]])
    assert build_method(AlgorithmConfig(), opd_kl_coef=0.5).targets(batch)["advantages"][0].tolist() == [-0.25, 0.5]
    own_loss = {"loss_type": "custom_loss", "custom_loss_function_path": "a.b"}
    off = build_method(AlgorithmConfig(disable_compute_advantages_and_returns=True, **own_loss))
    assert off.targets(batch) == {}
