"""Rates of phases, against a clock and a cost worked out by hand."""

from __future__ import annotations

from itertools import count

from qwench.models.memory import FORWARD, FORWARD_AND_BACKWARD, SequenceCost
from qwench.observability.timing import FlopMeter, PhaseTimer

COST = SequenceCost(linear=3e12, quadratic=1e12, head=2e12)
LENGTHS = [1, 2]
"""3 + 1 and 6 + 4: 14e12 FLOPs in a forward."""


def meter(cost: SequenceCost, *, num_ranks: int = 1) -> FlopMeter:
    """Return one whose every phase takes two seconds."""
    ticks = count(step=2)
    return FlopMeter(PhaseTimer(), cost, num_ranks=num_ranks, clock=lambda: float(next(ticks)))


def test_rate_is_the_flops_of_all_sequences_a_second_and_rank() -> None:
    meters = meter(COST, num_ranks=2)
    with meters.phase("log_probs", LENGTHS, num_scored=3, passes=FORWARD):
        pass
    with meters.phase("actor_train", LENGTHS, num_scored=3, passes=FORWARD_AND_BACKWARD):
        pass
    assert meters.take() == {"perf/log_probs_tflops": 14 / 2 / 2, "perf/actor_train_tflops": 3 * 14 / 2 / 2}
    assert meters.take() == {}


def test_utilisation_is_the_rate_of_training_by_the_peak() -> None:
    ticks = count(step=2)
    meters = FlopMeter(PhaseTimer(), COST, num_ranks=2, peak_tflops=21.0, clock=lambda: float(next(ticks)))
    with meters.phase("actor_train", LENGTHS, num_scored=3, passes=FORWARD_AND_BACKWARD):
        pass
    assert meters.take() == {"perf/actor_train_tflops": 10.5, "perf/actor_train_mfu": 0.5}
    with meters.phase("log_probs", LENGTHS, num_scored=3, passes=FORWARD):
        pass
    assert meters.take() == {"perf/log_probs_tflops": 3.5}


def test_tokens_without_logits_cost_no_output_layer() -> None:
    meters = meter(COST)
    with meters.phase("log_probs", LENGTHS, num_scored=1, passes=FORWARD):
        pass
    assert meters.take() == {"perf/log_probs_tflops": (14 - 2 * 2) / 2}
