"""The RL main loop. Generation runs in turn with training or ahead of it, on one device or many.

`rollouts` decides how far generation runs ahead; `gpus` decides who holds device memory; everything else is in order here.
Supervised fine-tuning is the same loop over rollouts that are read instead of generated, without engines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from qwench.checkpoints.manager import CheckpointManager
from qwench.checkpoints.starting import SavesRollouts, SavesTraining
from qwench.config.plan import RunPlan
from qwench.config.stop_metric import StopCheck
from qwench.engines.fleet.pool import EnginePool
from qwench.errors import EngineError, Stopped
from qwench.observability.metrics import MetricLog
from qwench.observability.stopping import SaveRequests, stop_requested, stops_deferred
from qwench.observability.timing import PhaseTimer
from qwench.rollout.evaluate_beside import EvaluationsBeside
from qwench.rollout.probe import TEMPERATURE, GreedyProbe
from qwench.samples import Rollout, Sample
from qwench.training.learner import Learned, ScoringModel
from qwench.training.memory_probe import MemoryProbe
from qwench.training.process_group import agree_on_largest
from qwench.weights.publisher import Devices, PublishedModel, Publisher

_logger = logging.getLogger(__name__)


class Rollouts(SavesRollouts, Protocol):
    """A source of scored rollouts: generated (`RolloutStream`), replayed (`ReplayStream`) or read (`SftStream`)."""

    def take(self, rollout_id: int) -> Rollout:
        """Return the next rollout; ids are asked for in order."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Bring what has begun to an end that a checkpoint can hold; no token is sampled inside the block."""
        ...

    def publishing(self, version: int) -> AbstractContextManager[None]:
        """Hold generation while `version` is published inside the block."""
        ...

    def interrupt(self, next_rollout_id: int) -> None:
        """End generation so that a checkpoint resumes with `next_rollout_id`."""
        ...

    def close(self) -> None:
        """End what is in flight."""
        ...


class StateProtocol(PublishedModel, SavesTraining, Protocol):
    """The models of the run, in this process (`training.state.TrainingState`) or on ranks (`cluster.workers.RemoteState`)."""

    def probe_memory(self, probe: MemoryProbe) -> str:
        """Train on the largest micro-batch and change nothing; return what it took."""
        ...


class LearnerProtocol(Protocol):
    """A learner in this process (`training.learner.Learner`) or on many ranks (`cluster.workers.RemoteLearner`)."""

    @property
    def state(self) -> StateProtocol:
        """Return the models that it improves."""
        ...

    def learn(self, rollout: Rollout) -> Learned:
        """Improve the policy on one rollout."""
        ...

    def log_probs(self, samples: Sequence[Sample], temperature: float, model: ScoringModel = "policy") -> list[list[float]]:
        """Return the log-probs [R] of each sample's response."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The parts of a run, as `launch.build` chose them."""

    plan: RunPlan
    learner: LearnerProtocol | None
    """None: rollouts are only generated."""
    rollouts: Rollouts
    engines: EnginePool | None
    gpus: Devices
    evaluate: Callable[[], Mapping[str, float]] | None
    """Returns `eval/...` metrics of the policy. None: there is nothing to evaluate on, or `beside` does it."""
    checkpoints: CheckpointManager
    metrics: MetricLog
    timer: PhaseTimer
    publisher: Publisher | None
    """None: rollouts are only generated."""
    beside: EvaluationsBeside | None = None
    """Evaluates while the policy is trained (--eval-num-gpus)."""
    probe: GreedyProbe | None = None
    """Compares FP8 engines with the learner after the first publication."""
    memory_probe: MemoryProbe | None = None
    """Finds out before the first rollout whether the largest micro-batch fits the trainer's memory."""
    finish: Callable[[], None] = lambda: None
    """Says what a run that is done has left."""
    close: Callable[[], None] = lambda: None
    """Ends engines, graders and trainer ranks."""


def train(run: Run) -> None:
    """Learn from every rollout of the schedule, evaluating, saving and publishing when due.

    Raises:
        Stopped: a signal came; the checkpoint of what was learned is saved.
    """
    learner, rollouts, gpus, schedule, publisher = run.learner, run.rollouts, run.gpus, run.plan.schedule, run.publisher
    assert learner is not None and publisher is not None, "a run that only generates has no learner"
    asked = SaveRequests(schedule.checkpoint.save, schedule.checkpoint.save_trigger_sentinel)
    enough = StopCheck(schedule.rollout.stop_metric)
    first = learned_from = run.checkpoints.restore(learner.state, rollouts)
    if has_ended(run):
        run.checkpoints.finish()
        return
    run.metrics.resume(first, run.checkpoints.train_steps(first))
    with gpus.held_by(learner.state):
        publisher.publish(version=first)
        probe_memory(run, learner)
    probe_engines(run, learner, version=first)
    run.timer.end_start()
    with stops_deferred(), asked.listening():
        for rollout_id in range(first, end := schedule.end(first)):
            with saved_when_stopped(run, learner, next_rollout_id=rollout_id):
                if (ended_by := what_ends(run, enough, rollout_id)) is not None:
                    if not run.checkpoints.note_end(rollout_id, ended_by):
                        with gpus.held_by(learner.state):
                            save(run, learner, rollout_id, ended_by=ended_by)
                    break
                with run.timer.phase("train_wait"):
                    rollout = rollouts.take(rollout_id)
            with gpus.held_by(learner.state):
                learned = learner.learn(rollout)
                learned_from = rollout_id + 1
                publisher.advance(version=rollout_id + 1)
                # Logged before it is saved: a run killed in between learns from the rollout again, and logs it once.
                metrics = {**rollout.metrics, **learned.metrics, **run.timer.take()}
                run.metrics.log(rollout_id, metrics, steps=learned.steps)
                is_enough = is_good_enough(enough, {**metrics, **dict(*learned.steps[-1:])})
                with saved_when_stopped(run, learner, next_rollout_id=rollout_id + 1, learner_holds_devices=True):
                    is_last = is_enough or rollout_id + 1 == end
                    if schedule.save_due(rollout_id, ends=is_last) or agree_on_largest(int(asked.pending())):
                        save(run, learner, rollout_id + 1, ended_by=enough.text if is_enough else None)
                        asked.done()
                    if is_enough:
                        break
                    # torchrun signals one rank after the other: all ranks must stop after the same rollout.
                    if stop := agree_on_largest(stop_requested() or 0):
                        raise Stopped(stop)
                    if schedule.publish_due(rollout_id):
                        with rollouts.publishing(rollout_id + 1):
                            publisher.publish(version=rollout_id + 1)
        else:
            with saved_when_stopped(run, learner, next_rollout_id=end):
                note_if_met(run, enough, evaluate_if_due(run, end), end)
        if run.beside is not None:
            with saved_when_stopped(run, learner, next_rollout_id=learned_from):
                note_if_met(run, enough, run.beside.finish(), learned_from)
    warn_if_never_logged(enough, has_learned=learned_from > first)
    run.checkpoints.finish()
    run.metrics.finish()


def has_ended(run: Run) -> bool:
    """Tell whether --stop-metric or --early-stopping-patience ended the run in the checkpoint that it resumes from; say so."""
    schedule, ended_by = run.plan.schedule, run.checkpoints.ended_by
    if ended_by is None or ended_by not in (schedule.rollout.stop_metric, schedule.checkpoint.early_stopping):
        return False
    flag = ended_by if ended_by == schedule.checkpoint.early_stopping else f"--stop-metric {ended_by}"
    _logger.info("the run has met %s: nothing to do; without the flag, or with another bound, it goes on", flag)
    return True


def what_ends(run: Run, enough: StopCheck, rollout_id: int) -> str | None:
    """Evaluate if it is due, and return the flag by which these weights end the run, as a checkpoint notes it; collective."""
    if is_good_enough(enough, evaluate_if_due(run, rollout_id)):
        return enough.text
    best = run.checkpoints.best_iteration
    if not agree_on_largest(int(run.plan.schedule.is_out_of_patience(rollout_id, best=best))):
        return None
    flag = run.plan.schedule.checkpoint.early_stopping
    _logger.info("%s is met: the run ends here%s", flag, f"; the best weights are in checkpoint {best}" if best else "")
    return flag


def is_good_enough(enough: StopCheck, metrics: Mapping[str, float]) -> bool:
    """Tell whether the metrics of any rank meet --stop-metric, and say so; collective."""
    is_met = enough.is_met(metrics)
    if is_met:
        _logger.info("--stop-metric %s is met: the run ends here", enough.text)
    return bool(agree_on_largest(int(is_met)))


def note_if_met(run: Run, enough: StopCheck, metrics: Mapping[str, float], next_rollout_id: int) -> None:
    """Note in the last checkpoint that its evaluation has met --stop-metric: the same command trains no further."""
    if enough.is_met(metrics):
        run.checkpoints.note_end(next_rollout_id, enough.text)


def warn_if_never_logged(enough: StopCheck, *, has_learned: bool) -> None:
    """Warn that --stop-metric names a metric that no rank has logged; collective."""
    if has_learned and not agree_on_largest(int(enough.was_logged)):
        _logger.warning("--stop-metric %s had no effect: no metric of this name was logged", enough.text)


def save(run: Run, learner: LearnerProtocol, next_rollout_id: int, *, ended_by: str | None) -> None:
    """Save. What is generated ahead is brought to an end first: it is saved whole, as today's weights sampled it."""
    with run.rollouts.paused():
        run.checkpoints.save(next_rollout_id, learner.state, run.rollouts, ended_by=ended_by)


@contextmanager
def saved_when_stopped(
    run: Run, learner: LearnerProtocol, *, next_rollout_id: int, learner_holds_devices: bool = False
) -> Iterator[None]:
    """Save what was learned when a signal ends the block.

    The engines may have had the same signal: then their failure, and not `Stopped`, ends the block.
    """
    try:
        yield
    except (Stopped, EngineError) as error:
        number = error.number if isinstance(error, Stopped) else stop_requested()
        if number is None:
            raise
        if run.beside is not None:
            run.beside.warn_lost(next_rollout_id=next_rollout_id)
        run.rollouts.interrupt(next_rollout_id)
        if not learner_holds_devices:
            run.gpus.keep_for(learner.state)
        raise Stopped(number, run.checkpoints.save_stopped(next_rollout_id, learner.state, run.rollouts)) from None


def generate(run: Run) -> None:
    """Only generate and grade the rollouts of the schedule, with the weights that the engines started with."""
    run.timer.end_start()
    for rollout_id in range(run.plan.schedule.end(0)):
        rollout = run.rollouts.take(rollout_id)
        run.metrics.log(rollout_id, {**rollout.metrics, **run.timer.take()})


def probe_memory(run: Run, learner: LearnerProtocol) -> None:
    """Find out whether training fits the memory; the learner holds the devices."""
    if run.memory_probe is not None:
        with run.timer.phase("memory_probe"):
            _logger.info(learner.state.probe_memory(run.memory_probe))


def probe_engines(run: Run, learner: LearnerProtocol, *, version: int) -> None:
    """Check that the log-probs of FP8 engines agree with those of the learner's weights."""
    if run.probe is None or run.engines is None:
        return
    with run.timer.phase("probe"):
        samples = run.probe.ask(run.engines)
        with run.gpus.held_by(learner.state):
            scored = learner.log_probs(samples, TEMPERATURE)
    run.metrics.log(version, run.probe.compare(samples, scored))


def evaluate_if_due(run: Run, rollout_id: int) -> Mapping[str, float]:
    """Evaluate and log the weights that learned from `rollout_id` rollouts, if it is due. Keep the best; return the metrics.

    Evaluations beside training only begin here; the metrics are those of the ones that are done.
    """
    is_due = run.plan.schedule.eval_due(rollout_id)
    if run.beside is not None:
        return run.beside.begin(rollout_id) if is_due else run.beside.collect()
    if run.evaluate is None or not is_due:
        return {}
    with run.timer.phase("eval"):
        evaluated = run.evaluate()
    run.metrics.log(rollout_id, evaluated)
    if rollout_id > 0 and run.learner is not None and run.checkpoints.is_best(rollout_id, evaluated):
        with run.gpus.held_by(run.learner.state), run.rollouts.paused():
            run.checkpoints.keep_best(rollout_id, evaluated, run.learner.state, run.rollouts)
    return evaluated
