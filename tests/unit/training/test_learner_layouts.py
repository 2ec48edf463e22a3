"""Ranks, micro-batches and packing change no number of any method."""

from typing import Any

import pytest
import torch

from qwench.estimators import METHODS
from qwench.samples import Verdict
from tests.fakes.trainer import TableTrainer, run_ranks
from tests.unit.training.table_learning import TABLE, learn, make_rollout

FLAGS: dict[str, dict[str, Any]] = {
    "grpo": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl", "entropy_coef": 0.01},
    "per_token": {"calculate_per_token_loss": True, "use_tis": True},
    "mis": {
        "use_tis": True,
        "tis_mode": "clip",
        "tis_level": "sequence",
        "tis_clip": 1.3,
        "tis_batch_normalize": True,
        "use_rs": True,
        "rs_veto_threshold": 0.85,
        "rs_upper_bound": 1.2,
    },
    "mis_token": {"use_tis": True, "tis_clip": 1.1, "tis_batch_normalize": True},
    "gspo": {"advantage_estimator": "gspo", "use_opsm": True},
    "cispo": {"advantage_estimator": "cispo", "eps_clip": 0.1},
    "rloo": {"advantage_estimator": "rloo", "use_rs": True, "rs_level": "geometric", "rs_upper_bound": 1.1},
    "reinforce_plus_plus_baseline": {
        "advantage_estimator": "reinforce_plus_plus_baseline",
        "normalize_advantages": True,
        "kl_coef": 0.1,
    },
    "gdpo": {"advantage_estimator": "gdpo"},
    "reinforce": {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True, "kl_coef": 0.1},
    "dr_grpo": {"advantage_estimator": "dr_grpo", "dr_grpo_length": 7, "use_rollout_logprobs": True, "eps_clip_c": 3.0},
    "sapo": {
        "advantage_estimator": "sapo",
        "sapo_tau_neg": 2.0,
        "use_rollout_entropy": True,
        "get_mismatch_metrics": True,
    },
    "gmpo": {"advantage_estimator": "gmpo", "eps_clip": 0.1},
    "gpg": {
        "advantage_estimator": "gpg",
        "use_kl_loss": True,
        "kl_loss_coef": 0.2,
        "kl_loss_type": "k3",
        "use_unbiased_kl": True,
    },
    "clip_cov": {"advantage_estimator": "clip_cov", "clip_cov_ratio": 0.2, "clip_cov_lb": -5.0},
    "kl_cov": {"advantage_estimator": "kl_cov", "kl_cov_ratio": 0.2},
    "dppo_tv": {"advantage_estimator": "dppo_tv", "eps_clip": 0.05},
    "dppo_kl": {"advantage_estimator": "dppo_kl", "eps_clip": 0.01},
    "maxrl": {
        "advantage_estimator": "maxrl",
        "use_tis": True,
        "tis_mode": "icepop",
        "tis_clip": 1.2,
        "tis_clip_low": 0.9,
    },
    "passk": {
        "advantage_estimator": "passk",
        "use_tis": True,
        "tis_mode": "mask",
        "tis_level": "geometric",
        "tis_clip": 1.3,
    },
    "sft": {"loss_type": "sft_loss", "calculate_per_token_loss": True},
}
"""Every method, with a form of the corrections or the KL beside it."""
LAYOUTS = [
    (1, {"micro_batch_size": 3}),
    (1, {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 16}),
    (2, {"micro_batch_size": 1}),
    (2, {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 16, "log_probs_max_tokens_per_gpu": 30}),
    (3, {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 1000, "balance_data": True}),
    (5, {"micro_batch_size": 4}),  # 4 samples in a step: one rank has nothing to do
]


def _comparable(learned):
    metrics = {name: value for name, value in learned.metrics.items() if not name.startswith("perf/")}
    return [metrics, *learned.steps]


@pytest.mark.parametrize("name", FLAGS)
def test_ranks_and_micro_batches_change_neither_weights_nor_metrics(name):
    rollout = make_rollout(seed=2)
    if name == "gdpo":
        for sample in rollout.samples:
            length = sample.response_length / 10
            sample.verdict = Verdict(score=sample.reward + length, reason="a+b", parts={"a": sample.reward, "b": length})
    flags = {"global_batch_size": 4, **FLAGS[name]}
    expected_backend, expected = learn(rollout, **flags)
    for dp_size, training in LAYOUTS:

        def run(parallel, all_reduce_sum, training=training):
            backend = TableTrainer(TABLE, parallel=parallel, all_reduce_sum=all_reduce_sum)
            return learn(rollout, backend=backend, training=training, **flags)

        ranks = run_ranks(dp_size, run)
        for backend, learned in ranks:
            torch.testing.assert_close(backend.table, expected_backend.table, rtol=1e-5, atol=1e-6)
            for got, wanted in zip(_comparable(learned), _comparable(expected), strict=True):
                assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert len({tuple(backend.num_micro_batches) for backend, _ in ranks}) == 1


def test_every_method_is_here_or_has_a_test_of_its_own():
    shown = {str(flags.get("advantage_estimator", "grpo")) for flags in FLAGS.values()} | {"sft"}
    elsewhere = {"ppo": "test_learner_critic.py: a critic learns on the same ranks"}
    assert METHODS.keys() - shown == elsewhere.keys()
