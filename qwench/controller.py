"""The main loop of reinforcement learning, synchronous or ahead of itself, on one device or many.

`rollouts` decides how far generation runs ahead; `gpus` decides who holds device memory; everything else is in order here.
"""

from __future__ import annotations

from qwench.run import Run
from qwench.weights.publish import publish_weights


def train(run: Run) -> None:
    """Learn from `num_rollout` rollouts, evaluating, saving and publishing when due."""
    learner, rollouts, engines, gpus = run.learner, run.rollouts, run.engines, run.gpus
    first = run.checkpoints.restore(learner, rollouts)
    publish_weights(learner, engines, gpus, version=first)
    for rollout_id in range(first, run.num_rollout):
        if run.schedule.eval_due(rollout_id):
            run.metrics.log(rollout_id, run.evaluator.evaluate(engines))
        rollout = rollouts.take(rollout_id)
        with gpus.held_by(learner):
            learned = learner.learn(rollout)
            if run.schedule.save_due(rollout_id):
                run.checkpoints.save(rollout_id + 1, learner, rollouts)
        if run.schedule.publish_due(rollout_id):
            with rollouts.drained():
                publish_weights(learner, engines, gpus, version=rollout_id + 1)
        run.metrics.log(rollout_id, {**rollout.metrics, **learned})
