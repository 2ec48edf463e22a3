"""Which model takes steps in which rollout where there is a critic, and which log-probs of a teacher must be there."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from qwench.errors import TrainingError
from qwench.observability.timing import PhaseTimer
from qwench.training.critic import Critic
from qwench.training.critic_link import CriticLink
from qwench.wire.weight_group import make_group
from tests.deadlines import patient
from tests.fakes.trainer import TableTrainer
from tests.unit.training.table_learning import TABLE, V, learn, make_critic_learner, make_learner, make_rollout

STEP = ["forward_backward", "optim_step"]


def learn_with_critic(rollout, **flags):
    policy, values = TableTrainer(TABLE), TableTrainer(torch.zeros(V, V), lr=0.1)
    _, learned = learn(rollout, backend=policy, critic=Critic(values, policy), advantage_estimator="ppo", **flags)
    return policy, values, learned.steps


def test_the_critic_scores_and_takes_its_steps_before_the_policy():
    policy, values, steps = learn_with_critic(make_rollout(), global_batch_size=4)
    assert values.calls == ["sleep", "wake", "forward", "sleep", "wake", *STEP, *STEP, "sleep"]
    assert policy.calls == ["forward", "sleep", "wake", "sleep", "wake", *STEP, *STEP]
    for step in steps:
        assert (step["train/lr-pg_0"], step["train/critic_lr"]) == (1.0, 0.1)
        assert step["train/critic_grad_norm"] > 0 and step["train/value_loss"] > 0
    assert len(steps) == 2


@pytest.mark.parametrize(("rollout_id", "policy_learns"), [(0, False), (1, False), (2, True)])
def test_at_first_the_critic_alone_takes_steps(rollout_id, policy_learns):
    policy, values, (step,) = learn_with_critic(make_rollout(rollout_id=rollout_id), num_critic_only=2)
    assert (values.calls.count("optim_step"), policy.calls.count("optim_step")) == (1, int(policy_learns))
    assert torch.equal(policy.table.detach(), TABLE) is not policy_learns
    assert ("train/loss" in step) is policy_learns and "train/critic_lr" in step


@pytest.mark.parametrize("rollout_id", [0, 1])
def test_a_critic_on_ranks_of_its_own_takes_the_same_steps_beside_the_policy(rollout_id):
    flags = {"advantage_estimator": "ppo", "kl_coef": 0.1, "global_batch_size": 4, "num_critic_only": 1}
    policy, values, store = TableTrainer(TABLE), TableTrainer(torch.zeros(V, V), lr=0.1), dist.HashStore()
    rollout = make_rollout(rollout_id=rollout_id)
    in_turn = learn(rollout, critic=Critic(TableTrainer(torch.zeros(V, V), lr=0.1), TableTrainer(TABLE)), **flags)

    def link(rank):
        return CriticLink(make_group("gloo", store, rank, 2, timedelta(seconds=patient(60))), rank=rank, num_policy_ranks=1)

    timer = PhaseTimer()

    def beside():
        return make_critic_learner(values, link(1), timer, **flags).learn(rollout)

    with ThreadPoolExecutor(1) as thread:
        critic = thread.submit(beside)
        learned = make_learner(policy, **flags, others={"link": link(0)}).learn(rollout).joined(critic.result())
    assert learned.steps == in_turn[1].steps and len(learned.steps) == 2
    for name in ("rollout/values", "rollout/returns", "rollout/advantages"):
        assert learned.metrics[name] == in_turn[1].metrics[name]
    assert values.calls == ["forward", *STEP, *STEP]
    assert {"perf/critic_values_time", "perf/critic_train_time"} <= timer.take().keys()
    assert [call for call in policy.calls if call in STEP] == (STEP * 2 if rollout_id else [])
    assert not {"sleep", "wake"} & {*policy.calls, *values.calls}


def test_samples_without_the_log_probs_of_the_teachers_server_are_an_error_and_no_step_without_it():
    rollout = make_rollout(rollout_id=4)
    for sample in rollout.samples[1:]:
        sample.teacher_log_probs = [-1.0] * sample.response_length
    backend = TableTrainer(TABLE)
    with pytest.raises(TrainingError, match="--opd-type sglang: not every sample of rollout 4 has the teacher's log-probs"):
        learn(rollout, backend=backend, opd_kl_coef=1.0)
    assert "optim_step" not in backend.calls and torch.equal(backend.table.detach(), TABLE)


def test_the_critics_passes_are_timed():
    timer = PhaseTimer()
    learn(
        make_rollout(),
        critic=Critic(TableTrainer(torch.zeros(V, V)), TableTrainer(TABLE)),
        advantage_estimator="ppo",
        timer=timer,
    )
    assert {"perf/critic_values_time", "perf/critic_train_time"} <= timer.take().keys()
