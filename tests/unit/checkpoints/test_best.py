import math

import pytest

from qwench.checkpoints.best import Best, Criterion, improvement, read_best
from qwench.errors import CheckpointError

LOSS = Criterion(metric="eval/held_out/loss", higher_is_better=False)
SCORE = Criterion(metric="eval/gsm8k", higher_is_better=True)


@pytest.mark.parametrize(
    ("criterion", "values", "best"),
    [
        (LOSS, [0.5, 0.4, 0.4, 0.6], 2),
        (SCORE, [0.5, 0.4, 0.6, 0.6], 3),
        (LOSS, [math.nan, 0.5, -math.inf], 2),
        (SCORE, [math.nan], None),
    ],
)
def test_the_first_of_the_best_values_is_kept(criterion, values, best):
    kept = None
    for iteration, value in enumerate(values, start=1):
        kept = improvement(kept, criterion, {criterion.metric: value}, iteration=iteration) or kept
    assert (kept and kept.iteration) == best


def test_what_was_not_measured_is_not_the_best():
    assert improvement(None, LOSS, {"eval/other/loss": 0.1}, iteration=1) is None


def test_the_best_by_another_metric_is_no_competitor():
    old = Best(iteration=9, metric="eval/gsm8k", value=0.9)
    assert improvement(old, LOSS, {LOSS.metric: 2.0}, iteration=10) == Best(iteration=10, metric=LOSS.metric, value=2.0)


def test_the_record_is_read_as_it_was_written(tmp_path):
    assert read_best(tmp_path) is None
    best = Best(iteration=40, metric=LOSS.metric, value=0.41)
    best.write(tmp_path)
    assert read_best(tmp_path) == best


def test_a_damaged_record_is_said(tmp_path):
    Best(iteration=40, metric=LOSS.metric, value=0.41).write(tmp_path)
    (tmp_path / "best_checkpoint.json").write_text('{"iteration": 4')
    with pytest.raises(CheckpointError, match=r"best_checkpoint.json is damaged"):
        read_best(tmp_path)
