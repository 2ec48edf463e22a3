import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwench.algorithms.reduction import execution_mean_weights, staleness_scales, token_mean_weights


def _masks(*rows):
    return [torch.tensor(row, dtype=torch.bool) for row in rows]


def test_execution_mean_by_hand():
    got = execution_mean_weights(_masks([1, 1], [1], [1, 0, 1]), torch.tensor([4, 9, 9]))
    assert [row.tolist() for row in got] == [[0.25, 0.25], [pytest.approx(1 / 6)], pytest.approx([1 / 6, 0, 1 / 6])]
    assert all(row.dtype == torch.float32 for row in got)


def test_fully_masked_execution_contributes_nothing_but_counts():
    got = execution_mean_weights(_masks([1, 1], [0, 0], []), torch.tensor([0, 1, 2]))
    assert got[0].tolist() == pytest.approx([1 / 6, 1 / 6])
    assert got[1].tolist() == [0.0, 0.0]


def test_token_mean_by_hand_counts_an_empty_sample_as_one_token():
    got = token_mean_weights(_masks([1, 1, 0], [1], [0, 0]))
    assert [row.tolist() for row in got] == [[0.25, 0.25, 0.0], [0.25], [0.0, 0.0]]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.booleans(), max_size=6)), min_size=1, max_size=10))
def test_weighted_sum_equals_the_two_level_mean(rows):
    generator = torch.Generator().manual_seed(len(rows))
    losses = [torch.randn(len(mask), generator=generator) for _, mask in rows]
    masks = _masks(*[mask for _, mask in rows])
    executions = sorted({execution for execution, _ in rows})
    expected = 0.0
    for execution in executions:
        picked = [i for i, (e, _) in enumerate(rows) if e == execution]
        total = sum(float(losses[i][t]) for i in picked for t in range(len(losses[i])) if rows[i][1][t])
        expected += total / max(sum(sum(rows[i][1]) for i in picked), 1)
    weights = execution_mean_weights(masks, torch.tensor([execution for execution, _ in rows]))
    got = sum(float((weight * loss).sum()) for weight, loss in zip(weights, losses, strict=True))
    assert got == pytest.approx(expected / len(executions), rel=1e-5, abs=1e-6)


def test_staleness_scales_make_means_over_fresh_and_over_stale_tokens():
    weights = [torch.tensor([0.125, 0.125, 0.5]), torch.tensor([0.25, 0.25])]
    masks, staleness = _masks([1, 1, 0], [1, 1]), [torch.tensor([0, 2, 0]), torch.tensor([0, 1])]
    # Fresh tokens weigh 0.125 + 0.25, stale ones as much; the masked token is neither.
    fresh, stale = staleness_scales(weights, masks, staleness)
    assert [row.tolist() for row in fresh] == [pytest.approx([1 / 0.375, 0.0, 0.0]), pytest.approx([1 / 0.375, 0.0])]
    assert [row.tolist() for row in stale] == [pytest.approx([0.0, 1 / 0.375, 0.0]), pytest.approx([0.0, 1 / 0.375])]
    _, none = staleness_scales(weights, masks, [torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)])
    assert [row.tolist() for row in none] == [[0.0] * 3, [0.0] * 2]


def test_a_column_that_misses_a_sample_is_an_error():
    masks, ages = _masks([1], [1]), [torch.zeros(1)] * 2
    for columns in ((ages[:1], masks, ages), (ages, masks, ages[:1])):
        with pytest.raises(ValueError, match="than argument"):
            staleness_scales(*columns)
