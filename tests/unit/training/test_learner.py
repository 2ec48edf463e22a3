import math

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.errors import RewardError, TrainingError
from qwench.observability.timing import PhaseTimer
from qwench.samples import Group, Prompt, Rollout, Sample, Status
from qwench.training.hooks import Hooks
from qwench.training.learner import _check_equal_bits
from tests.fakes.trainer import TableTrainer
from tests.unit.training.table_learning import TABLE, TEMPERATURE, learn, make_learner, make_rollout

STEP = ["forward_backward", "optim_step"]


def test_calls_with_reference_and_two_steps_come_in_order():
    backend, learned = learn(make_rollout(), global_batch_size=4, use_kl_loss=True)
    assert backend.calls == ["copy_held_weights", "forward", "forward", *STEP, *STEP]
    assert len(learned.steps) == 2


def test_each_rollout_may_begin_with_fresh_moments():
    backend, _ = learn(make_rollout(), global_batch_size=4, others={"forgets_moments": True})
    assert backend.calls == ["forward", "forget_moments", *STEP, *STEP]


@pytest.mark.parametrize(
    ("global_batch_size", "flags", "recomputed"),
    [
        (8, {}, False),
        (4, {}, True),
        (8, {"use_tis": True}, False),
        (8, {"advantage_estimator": "gspo"}, True),
        (8, {"get_mismatch_metrics": True}, True),
        (8, {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True}, False),
        (4, {"use_rollout_logprobs": True}, False),
        (4, {"use_rollout_logprobs": True, "get_mismatch_metrics": True}, True),
        (4, {"loss_type": "sft_loss"}, False),
        (8, {"advantage_estimator": "gspo", "skip_actor_forward_only": True}, False),
        (8, {"get_mismatch_metrics": True, "skip_actor_forward_only": True}, False),
    ],
)
def test_old_log_probs_are_computed_only_when_they_differ_from_the_updates_own(global_batch_size, flags, recomputed):
    backend, learned = learn(make_rollout(), global_batch_size=global_batch_size, **flags)
    assert ("forward" in backend.calls) == recomputed
    assert ("rollout/log_probs" in learned.metrics) == recomputed


def test_entropy_of_the_policy_before_its_first_step_joins_the_batch():
    kept = []
    others = {"record": lambda rollout_id, batch: kept.append(batch)}
    backend, learned = learn(make_rollout(), global_batch_size=4, use_rollout_entropy=True, others=others)
    assert backend.calls == ["forward", *STEP, *STEP]
    (batch,), rows = kept, (TABLE / TEMPERATURE).softmax(-1)
    entropy_of = -(rows * rows.log()).sum(-1)
    means = []
    for tokens, mask, entropy in zip(batch.tokens, batch.loss_mask, batch.old_entropy, strict=True):
        before = tokens[len(tokens) - len(mask) - 1 : -1]
        torch.testing.assert_close(entropy[mask], entropy_of[before][mask])
        means.append(float(entropy_of[before][mask].mean()))
    assert learned.metrics["rollout/entropy"] == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_without_the_flag_no_entropy_is_computed():
    kept = []
    _, learned = learn(make_rollout(), global_batch_size=4, others={"record": lambda rollout_id, batch: kept.append(batch)})
    assert kept[0].old_entropy is None and "rollout/entropy" not in learned.metrics


def test_hooks_come_before_each_pass_and_each_step():
    backend = TableTrainer(TABLE)
    hooks = Hooks(
        before_log_probs=lambda prefix: backend.calls.append(f"hook {prefix}log_probs"),
        before_step=lambda rollout_id, step_id: backend.calls.append(f"hook {rollout_id} {step_id}"),
    )
    learn(make_rollout(rollout_id=3), backend=backend, global_batch_size=4, use_kl_loss=True, hooks=hooks)
    scored = ["hook ref_log_probs", "forward", "hook log_probs", "forward"]
    assert backend.calls[1:] == [*scored, "hook 3 0", *STEP, "hook 3 1", *STEP]


def test_passes_without_a_gradient_have_their_own_token_cap():
    caps = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 20, "log_probs_max_tokens_per_gpu": 10**6}
    rollout = make_rollout()
    backend, _ = learn(rollout, training=caps, use_kl_loss=True)
    assert [call for call in backend.calls if call in ("forward", "forward_backward")] == ["forward", "forward_backward"]
    total = sum(len(sample.tokens) for sample in rollout.samples)
    assert total > 2 * 20
    assert backend.num_micro_batches[0] == 1 and backend.num_micro_batches[1] >= total / 20


def test_kl_in_the_reward_needs_both_policies_log_probs():
    flags = {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True, "kl_coef": 0.1}
    backend, _ = learn(make_rollout(), **flags)
    assert backend.calls == ["copy_held_weights", "forward", "forward", *STEP]


def _plain_grpo(rollout, table, *, eps=0.2):
    """Return loss and gradient of one GRPO step, sample by sample, without packing."""
    table = table.clone().requires_grad_()
    total = torch.zeros(())
    for group in rollout.groups:
        rewards = torch.tensor(group.rewards)
        for sample, reward in zip(group.samples, rewards, strict=True):
            advantage = 0.0 if len(set(group.rewards)) == 1 else (reward - rewards.mean()) / (rewards.std() + 1e-6)
            log_probs = (table / TEMPERATURE).log_softmax(-1)
            start, token_losses = len(sample.tokens) - sample.response_length, []
            for t, trained in enumerate(sample.loss_mask):
                if trained:
                    log_prob = log_probs[sample.tokens[start + t - 1], sample.tokens[start + t]]
                    ratio = (log_prob - log_prob.detach()).exp()
                    token_losses.append(torch.max(-ratio * advantage, -ratio.clamp(1 - eps, 1 + eps) * advantage))
            total = total + torch.stack(token_losses).mean() / len(rollout.samples)
    total.backward()
    return float(total.detach()), table.grad


def test_one_step_of_grpo_equals_a_plain_loop_over_samples():
    rollout = make_rollout()
    backend, learned = learn(rollout)
    loss, gradient = _plain_grpo(rollout, TABLE)
    assert learned.steps[0]["train/loss"] == pytest.approx(loss, abs=1e-6)
    assert learned.steps[0]["train/grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    torch.testing.assert_close(backend.table.detach(), TABLE - gradient, rtol=1e-5, atol=1e-6)


def test_learning_raises_the_probability_of_rewarded_tokens():
    prompt = Prompt(text="", token_ids=(0,))
    samples = []
    for i, token in enumerate([1, 2, 3, 1]):
        sample = Sample(prompt=prompt, sample_id=i, group_id=0, reward=float(token == 1), status=Status.COMPLETED)
        sample.append([token], log_probs=[-1.0], version=0)
        samples.append(sample)
    backend, _ = learn(Rollout(rollout_id=0, groups=[Group(group_id=0, samples=samples)]), global_batch_size=4)
    before, after = (table.softmax(-1)[0] for table in (TABLE, backend.table.detach()))
    assert after[1] > before[1]
    assert (after[2:4] < before[2:4]).all()


def test_the_gap_to_the_engine_is_that_of_the_weights_that_sampled():
    def steps_with_gap(**flags):
        _, learned = learn(make_rollout(), global_batch_size=4, **flags)
        return [any(name.startswith("train/train_rollout_") for name in step) for step in learned.steps]

    assert steps_with_gap() == [True, True]
    # Without a pass for the old log-probs there is nothing to compare with once a step has changed the weights.
    assert steps_with_gap(use_rollout_logprobs=True) == [True, False]


def test_order_of_samples_within_a_step_does_not_change_the_weights():
    rollout = make_rollout(seed=4)
    shuffled = Rollout(
        rollout_id=0, groups=[Group(group_id=g.group_id, samples=g.samples[::-1]) for g in reversed(rollout.groups)]
    )
    first, second = learn(rollout)[0], learn(shuffled)[0]
    torch.testing.assert_close(first.table, second.table, rtol=1e-5, atol=1e-6)


def test_trailing_executions_that_fill_no_step_are_dropped_and_counted(caplog):
    rollout = make_rollout()
    backend, learned = learn(rollout, global_batch_size=3)
    assert backend.calls == ["forward", *STEP, *STEP]
    assert learned.metrics["rollout/dropped_executions"] == 2.0
    assert learned.metrics["rollout/raw_reward"] == pytest.approx(sum(s.reward for s in rollout.samples[:6]) / 6)
    assert caplog.messages == ["rollout 0: 2 trailing executions do not fill a step of --global-batch-size 3 and are dropped"]


def test_a_rollout_of_another_size_fills_one_step():
    _, learned = learn(make_rollout(num_groups=3), global_batch_size=8, training={"use_dynamic_global_batch_size": True})
    assert len(learned.steps) == 1 and learned.metrics["rollout/dropped_executions"] == 0
    _, cut = learn(make_rollout(num_groups=3), global_batch_size=8)
    assert len(cut.steps) == 1 and cut.metrics["rollout/dropped_executions"] == 4


def test_dropped_samples_still_count_in_their_groups_mean():
    prompt = Prompt(text="", token_ids=(0,))
    samples = []
    for i, reward in enumerate([1.0, 1.0, 4.0]):
        sample = Sample(prompt=prompt, sample_id=i, group_id=0, reward=reward, status=Status.COMPLETED)
        sample.append([1], log_probs=[-1.0], version=0)
        samples.append(sample)
    rollout = Rollout(rollout_id=0, groups=[Group(group_id=0, samples=samples)])
    _, learned = learn(rollout, global_batch_size=2, disable_grpo_std_normalization=True)
    assert learned.metrics["rollout/rewards"] == pytest.approx(-1.0)


def test_samples_of_one_execution_share_its_weight_in_the_loss():
    prompt = Prompt(text="", token_ids=(0,))
    samples = []
    for i, (execution_id, response) in enumerate([(0, [1]), (1, [1, 2]), (1, [3])]):
        sample = Sample(prompt=prompt, sample_id=i, group_id=0, execution_id=execution_id, reward=float(execution_id))
        sample.append(response, log_probs=[-1.0] * len(response), version=0)
        samples.append(sample)
    rollout = Rollout(rollout_id=0, groups=[Group(group_id=0, samples=samples)])
    _, learned = learn(rollout, global_batch_size=2)
    # Ratios are 1, so the loss is minus the mean over executions of their advantages, which are opposite.
    assert learned.steps[0]["train/loss"] == pytest.approx(0.0, abs=1e-6)
    assert len(learned.steps) == 1


def test_step_metrics_have_the_names_users_know():
    _, learned = learn(make_rollout(), use_kl_loss=True, observe_training_entropy=True)
    assert set(learned.steps[0]) == {
        "train/loss", "train/grad_norm", "train/lr-pg_0", "train/pg_loss", "train/pg_clipfrac", "train/ppo_kl",
        "train/kl_loss", "train/entropy_loss", "train/train_rollout_kl", "train/train_rollout_logprob_abs_diff",
        "train/train_rollout_logprob_abs_diff_max",
    }  # fmt: skip
    assert set(learned.metrics) == {
        "rollout/raw_reward", "rollout/rewards", "rollout/response_lengths", "rollout/total_lengths", "rollout/truncated",
        "rollout/advantages", "rollout/ref_log_probs", "rollout/rollout_log_probs", "rollout/dropped_executions",
        "perf/actor_train_tok_per_s", "perf/actor_train_tflops", "perf/ref_log_probs_tflops",
    }  # fmt: skip


@pytest.mark.parametrize("global_batch_size", [8, 4], ids=["from_the_update", "from_the_old_pass"])
def test_trainer_engine_difference_is_the_distance_from_the_tables_log_probs(global_batch_size):
    rollout = make_rollout(off_policy=0.3)
    _, learned = learn(rollout, global_batch_size=global_batch_size)
    means, largest = [], 0.0
    for sample in rollout.samples[:global_batch_size]:
        start = len(sample.tokens) - sample.response_length
        rows = (TABLE / TEMPERATURE).log_softmax(-1)
        differences = [
            abs(float(rows[sample.tokens[start + t - 1], sample.tokens[start + t]]) - sample.rollout_log_probs[t])
            for t in range(sample.response_length)
            if sample.loss_mask[t]
        ]
        means.append(sum(differences) / len(differences))
        largest = max(largest, *differences)
    step = learned.steps[0]
    assert step["train/train_rollout_logprob_abs_diff"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert step["train/train_rollout_logprob_abs_diff_max"] == pytest.approx(largest, rel=1e-4)


def test_sft_step_is_the_mean_negative_log_likelihood_of_all_trained_tokens():
    rollout = make_rollout()
    for sample in rollout.samples:
        sample.rollout_log_probs, sample.reward = [], None
    backend, learned = learn(rollout, loss_type="sft_loss", calculate_per_token_loss=True)
    rows = (TABLE / TEMPERATURE).log_softmax(-1)
    losses = [
        -float(rows[sample.tokens[k - 1], sample.tokens[k]])
        for sample in rollout.samples
        for k, trained in enumerate(sample.loss_mask, len(sample.tokens) - sample.response_length)
        if trained
    ]
    assert backend.calls == STEP
    assert set(learned.steps[0]) == {"train/loss", "train/grad_norm", "train/lr-pg_0"}
    assert learned.steps[0]["train/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_nan_stops_before_the_weights_change():
    rollout = make_rollout()
    rollout.samples[0].rollout_log_probs[0] = math.nan
    backend = TableTrainer(TABLE)
    with pytest.raises(TrainingError, match="not finite"):
        learn(rollout, backend=backend, use_tis=True)
    assert torch.equal(backend.table.detach(), TABLE)


@pytest.mark.parametrize(("flag", "field"), [("--use-tis", "use_tis"), ("--use-rollout-logprobs", "use_rollout_logprobs")])
def test_corrections_without_the_engines_log_probs_are_an_error(flag, field):
    rollout = make_rollout()
    for sample in rollout.samples:
        sample.rollout_log_probs = [0.0] * sample.response_length
    with pytest.raises(TrainingError, match=f"{flag} needs the engine's log-probs, rollout 0 has none"):
        learn(rollout, **{field: True})


def test_reference_becomes_the_policy_at_its_interval():
    backend = TableTrainer(TABLE)
    learner = make_learner(backend, use_kl_loss=True, ref_update_interval=2)
    learned = [learner.learn(make_rollout(seed=i, rollout_id=i)) for i in range(3)]
    assert [call for call in backend.calls if call in ("copy_held_weights", "optim_step")] == [
        "copy_held_weights", "optim_step", "optim_step", "copy_held_weights", "optim_step",
    ]  # fmt: skip
    kl = [step["train/kl_loss"] for one in learned for step in one.steps]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(kl[1]) > 1e-3
    assert kl[2] == pytest.approx(0.0, abs=1e-6)


def test_custom_reward_post_process_replaces_the_normalisation():
    _, learned = learn(make_rollout(), reward_post_process=lambda samples: [float(i) for i in range(len(samples))])
    assert learned.metrics["rollout/rewards"] == pytest.approx(3.5)
    assert learned.metrics["rollout/raw_reward"] <= 1.0


def test_custom_reward_post_process_must_return_one_reward_for_each_sample():
    with pytest.raises(RewardError, match="returned 1 rewards for 8 samples"):
        learn(make_rollout(), reward_post_process=lambda samples: [1.0])


@pytest.mark.parametrize(
    ("answer", "message"),
    [*((answer, "numbers") for answer in (None, 5, ["x"] * 8, [None] * 8)), ([float("nan")] * 8, "not finite")],
)
def test_custom_reward_post_process_must_return_finite_numbers(answer, message):
    with pytest.raises(RewardError, match=rf"--custom-reward-post-process-path .*{message}"):
        learn(make_rollout(), reward_post_process=lambda samples: answer)


def test_phases_are_timed():
    timer = PhaseTimer()
    learn(make_rollout(), timer=timer, global_batch_size=4, use_kl_loss=True)
    assert {"perf/train_time", "perf/ref_log_probs_time", "perf/log_probs_time", "perf/actor_train_time"} <= set(timer.take())


def test_saved_state_is_loaded_with_its_weights(tmp_path):
    backend, _ = learn(make_rollout())
    make_learner(backend).state.save(tmp_path)
    other = TableTrainer(TABLE)
    state = make_learner(other).state
    state.load(tmp_path)
    assert torch.equal(other.table, backend.table)
    assert torch.equal(state.shared_weights()["table"], backend.table)
    assert [name for bucket in state.weights(bucket_bytes=1) for name, _ in bucket] == ["table"]
    state.sleep()
    state.wake()
    assert other.calls == ["sleep", "wake"]


def test_reference_that_moves_is_saved_and_loaded_with_the_policy(tmp_path):
    flags = {"use_kl_loss": True, "kl_loss_coef": 0.1, "ref_update_interval": 2}
    first, second = TableTrainer(TABLE), TableTrainer(TABLE)
    learner, resumed = make_learner(first, **flags), make_learner(second, **flags)
    for i in range(3):
        learner.learn(make_rollout(seed=i, rollout_id=i))
    learner.state.save(tmp_path)
    resumed.state.load(tmp_path)
    expected, got = (one.learn(make_rollout(seed=3, rollout_id=3)) for one in (learner, resumed))
    assert got.steps == expected.steps
    assert torch.equal(first.table, second.table)


def test_reference_that_stays_is_not_saved(tmp_path):
    make_learner(use_kl_loss=True).state.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["table.pt"]


def test_a_step_without_advantages_at_trained_tokens_may_have_gradient_zero(caplog):
    rollout = make_rollout()
    for sample in rollout.samples:
        sample.reward = 1.0
    _, learned = learn(rollout, global_batch_size=8)
    assert [step["train/grad_norm"] for step in learned.steps] == [0.0]
    assert "policy is dead" not in caplog.text and "no trained token" not in caplog.text


def test_trained_tokens_of_older_weights_alone_leave_no_gap_to_measure():
    rollout = make_rollout(rollout_id=3)
    for sample in rollout.samples:
        # What the policy did not write has version -1, whatever weights were current.
        sample.weight_versions = [2 if trained else -1 for trained in sample.loss_mask]
    _, learned = learn(rollout, global_batch_size=8)
    assert not [name for name in learned.steps[0] if name.startswith("train/train_rollout_")]


def test_samples_are_scored_under_the_held_weights_at_the_asked_temperature():
    samples = make_rollout().samples
    scored = make_learner().log_probs(samples, temperature=0.5)
    for sample, own in zip(samples, scored, strict=True):
        begin = len(sample.tokens) - sample.response_length
        rows = (TABLE / 0.5).log_softmax(-1)[sample.tokens[begin - 1 : -1]]
        expected, trained = rows[range(sample.response_length), sample.tokens[begin:]], torch.tensor(sample.loss_mask).bool()
        torch.testing.assert_close(torch.tensor(own)[trained], expected[trained])


def test_equal_bits_are_required_where_a_token_is_trained_on():
    batch = RolloutBatch.from_samples(make_rollout(group_size=1).samples)
    same = [column.clone() for column in batch.rollout_log_probs]
    _check_equal_bits(batch.with_columns(old_log_probs=same), 4)
    outside = [torch.where(mask, column, column + 1) for column, mask in zip(same, batch.loss_mask, strict=True)]
    _check_equal_bits(batch.with_columns(old_log_probs=outside), 4)
    same[0][-1] -= 0.25
    total = sum(int(mask.sum()) for mask in batch.loss_mask)
    with pytest.raises(TrainingError, match=rf"in rollout 4 1 of {total} log-probs of the engine .*\(largest gap 0.25\)"):
        _check_equal_bits(batch.with_columns(old_log_probs=same), 4)
    for column in ("rollout_log_probs", "old_log_probs"):
        with pytest.raises(TrainingError, match="rollout 4 brings no log-probs of the engine to compare with"):
            _check_equal_bits(batch.with_columns(**{"old_log_probs": same, column: None}), 4)
