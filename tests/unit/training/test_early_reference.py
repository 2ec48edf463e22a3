import torch

from qwench.observability.timing import PhaseTimer
from tests.fakes.trainer import TableTrainer
from tests.unit.training.table_learning import TABLE, TEMPERATURE, learn, make_learner, make_rollout

STEP = ["forward_backward", "optim_step"]


def test_what_the_reference_scored_early_is_not_scored_again_and_gives_the_same_numbers():
    batches, timer = [], PhaseTimer()
    others = {"record": lambda rollout_id, batch: batches.append(batch)}
    flags = {"global_batch_size": 4, "use_kl_loss": True, "others": others}
    _, late = learn(make_rollout(), **flags)
    rollout, backend = make_rollout(), TableTrainer(TABLE)
    learner = make_learner(backend, timer=timer, **flags)
    early = rollout.samples[1:4]
    for sample, scored in zip(early, learner.log_probs(early, TEMPERATURE, "reference"), strict=True):
        sample.ref_log_probs = scored
    learned = learner.learn(rollout)
    assert backend.calls == ["copy_held_weights", "forward", "forward", "forward", *STEP, *STEP]
    for whole, parts, mask in zip(*(batch.ref_log_probs for batch in batches), batches[0].loss_mask, strict=True):
        assert torch.equal(whole[mask], parts[mask])
    assert learned.steps == late.steps and learned.metrics["perf/early_ref_share"] == 3 / 8
    assert not [name for name in late.metrics if "early" in name]
    assert {"perf/early_ref_log_probs_time", "perf/ref_log_probs_time"} <= set(timer.take())


def test_early_scores_of_a_sample_that_is_out_of_the_loss_since_are_zero_and_nothing_is_left_to_score():
    batches, rollout, backend = [], make_rollout(), TableTrainer(TABLE)
    others = {"record": lambda rollout_id, batch: batches.append(batch)}
    learner = make_learner(backend, use_kl_loss=True, others=others)
    for sample in rollout.samples:
        sample.ref_log_probs = [-9.0] * sample.response_length
    rollout.samples[2].mask_out()
    learned = learner.learn(rollout)
    assert backend.calls == ["copy_held_weights", *STEP] and learned.metrics["perf/early_ref_share"] == 1.0
    (batch,) = batches
    for i, (column, mask) in enumerate(zip(batch.ref_log_probs, batch.loss_mask, strict=True)):
        assert column.tolist() == [-9.0 * float(trained) for trained in mask] and mask.any() == (i != 2)


def test_early_scores_of_another_length_are_scored_again():
    rollout, backend = make_rollout(), TableTrainer(TABLE)
    for sample in rollout.samples:
        sample.ref_log_probs = [-9.0] * (sample.response_length + 1)
    _, plain = learn(make_rollout(), use_kl_loss=True)
    _, learned = learn(rollout, backend=backend, use_kl_loss=True)
    assert learned.steps == plain.steps and "perf/early_ref_share" not in learned.metrics
