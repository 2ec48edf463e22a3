"""Learning rates worked out by hand from Megatron-LM's rules."""

import math

import pytest

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.errors import ConfigError
from qwench.training.optimizers.schedule import LrSchedule


def _rates(steps, *, style, total_steps=1, **flags):
    schedule = LrSchedule(OptimizerConfig(lr=1.0, lr_decay_style=style, **flags), total_steps=total_steps)
    return [schedule.at(step) for step in steps]


def test_constant_after_linear_warmup():
    got = _rates((0, 1, 2, 4, 5, 1000), style="constant", lr_warmup_iters=4, lr_warmup_init=0.2)
    assert got == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0, 1.0])


def test_one_step_of_warmup_starts_at_the_initial_rate():
    assert _rates((0, 1, 2), style="constant", lr_warmup_iters=1, lr_warmup_init=0.2) == [0.2, 1.0, 1.0]
    assert _rates((0,), style="constant", lr_warmup_init=0.2) == [1.0]


def test_linear_falls_from_the_end_of_warmup_to_the_minimum_at_the_end_of_the_run():
    got = _rates((0, 1, 2, 4, 6, 10, 11, 99), style="linear", min_lr=0.2, lr_warmup_iters=2, total_steps=10)
    assert got == pytest.approx([0.0, 0.5, 1.0, 0.8, 0.6, 0.2, 0.2, 0.2])


def test_decay_steps_of_the_flag_win_and_warmup_is_a_share_of_them():
    got = _rates((0, 1, 2, 6, 10), style="linear", lr_decay_iters=10, lr_warmup_fraction=0.2, total_steps=1000)
    assert got == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_a_share_may_end_the_warmup_between_two_steps():
    # Megatron counts samples: 0.1 of 25 steps of 4 are 10 samples, so step 2 (8 samples) has 8/10 and step 3 (12) decays.
    got = _rates((0, 1, 2, 3, 25), style="linear", lr_warmup_fraction=0.1, total_steps=25)
    assert got == pytest.approx([0.0, 0.4, 0.8, 1 - 2 / 90, 0.0])


def test_cosine_is_halfway_in_the_middle():
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))
    got = _rates((0, 2, 4, 8, 9), style="cosine", min_lr=0.1, total_steps=8)
    assert got == pytest.approx([1.0, quarter, 0.55, 0.1, 0.1])


def test_inverse_square_root_counts_from_the_end_of_warmup():
    got = _rates((2, 4, 16, 25, 64, 101), style="inverse-square-root", min_lr=0.3, lr_warmup_iters=4, total_steps=100)
    assert got == pytest.approx([0.5, 1.0, 0.5, 0.4, 0.3, 0.3])


def test_inverse_square_root_without_warmup_counts_from_the_first_step():
    got = _rates((0, 1, 4, 100, 101), style="inverse-square-root", total_steps=100)
    assert got == pytest.approx([1.0, 1.0, 0.5, 0.1, 0.0])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1.0, 0.775, 0.55, 0.1]),
        ("cosine", [1.0, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)), 0.55, 0.1]),
        ("exponential", [1.0, 0.1 + 0.9 * (2 * 0.5**0.25 - 1), 0.1 + 0.9 * (math.sqrt(2) - 1), 0.1]),
        ("minus_sqrt", [1.0, 0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5)), 0.1]),
    ],
)
def test_wsd_stays_at_the_peak_and_decays_over_its_last_steps(shape, expected):
    flags = {"lr_wsd_decay_iters": 4, "lr_wsd_decay_style": shape, "min_lr": 0.1, "lr_warmup_iters": 2}
    got = _rates((0, 1, 2, 5, 6, 7, 8, 10, 11), style="WSD", total_steps=10, **flags)
    assert got == pytest.approx([0.0, 0.5, 1.0, 1.0, *expected, 0.1])


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"style": "WSD"}, "--lr-decay-style WSD .* --lr-wsd-decay-iters"),
        (
            {"style": "WSD", "lr_wsd_decay_iters": 9, "lr_warmup_iters": 2, "total_steps": 10},
            "--lr-wsd-decay-iters 9 is more",
        ),
        (
            {"style": "cosine", "lr_wsd_decay_iters": 3, "total_steps": 9},
            "--lr-wsd-decay-iters has no effect",
        ),
        ({"style": "linear", "lr_wsd_decay_style": "linear", "total_steps": 9}, "--lr-wsd-decay-style has no effect with"),
        ({"style": "constant", "lr_warmup_init": 2.0}, r"--lr-warmup-init \(2.0\)"),
        ({"style": "cosine", "lr_warmup_iters": 1}, "--lr-decay-iters"),
        ({"style": "linear", "lr_warmup_iters": 5, "total_steps": 5}, "--lr-warmup-iters"),
    ],
)
def test_contradictions_name_their_flag(flags, flag):
    with pytest.raises(ConfigError, match=flag):
        _rates((0,), **flags)
