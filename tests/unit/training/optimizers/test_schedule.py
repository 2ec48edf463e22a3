"""Learning rates worked out by hand from Megatron-LM's rules."""

import math

import pytest

from qwench.errors import ConfigError
from qwench.training.optimizers.schedule import LrSchedule


def test_constant_after_linear_warmup():
    schedule = LrSchedule(peak=1.0, warmup_steps=4, initial=0.2)
    assert [schedule.at(step) for step in (0, 1, 2, 4, 5, 1000)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0, 1.0])


def test_linear_falls_from_the_end_of_warmup_to_the_minimum():
    schedule = LrSchedule(peak=1.0, minimum=0.2, style="linear", warmup_steps=2, decay_steps=10)
    assert [schedule.at(step) for step in (0, 1, 2, 4, 6, 10, 11, 99)] == pytest.approx(
        [0.0, 0.5, 1.0, 0.8, 0.6, 0.2, 0.2, 0.2]
    )


def test_cosine_is_halfway_in_the_middle():
    schedule = LrSchedule(peak=1.0, minimum=0.1, style="cosine", decay_steps=8)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))
    assert [schedule.at(step) for step in (0, 2, 4, 8, 9)] == pytest.approx([1.0, quarter, 0.55, 0.1, 0.1])


def test_inverse_square_root_counts_from_the_end_of_warmup():
    schedule = LrSchedule(peak=1.0, minimum=0.3, style="inverse-square-root", warmup_steps=4, decay_steps=100)
    assert [schedule.at(step) for step in (2, 4, 16, 25, 64, 101)] == pytest.approx([0.5, 1.0, 0.5, 0.4, 0.3, 0.3])


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"style": "WSD"}, "--lr-decay-style 'WSD'; known: constant, linear"),
        ({"minimum": 2.0}, r"--min-lr \(2.0\)"),
        ({"initial": 2.0}, r"--lr-warmup-init \(2.0\)"),
        ({"style": "cosine"}, "--lr-decay-iters"),
        ({"style": "linear", "warmup_steps": 5, "decay_steps": 5}, "--lr-warmup-iters"),
    ],
)
def test_contradictions_name_their_flag(values, flag):
    with pytest.raises(ConfigError, match=flag):
        LrSchedule(peak=1.0, **values)
