"""Bounds at which a run ends."""

import pytest

from qwench.config.stop_metric import StopCheck, StopMetric
from qwench.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value", "met"),
    [
        ("eval/aime>=0.6", 0.6, True),
        ("eval/aime >= 6e-1", 0.59, False),
        ("eval/aime<=0.1", 0.1, True),
        ("eval/aime<=-1", 0.0, False),
        ("eval/aime>=0", float("nan"), False),
    ],
)
def test_a_bound_is_met_at_its_value(text, value, met):
    assert StopMetric.parse(text).is_met({"eval/aime": value}) is met
    assert not StopMetric.parse(text).is_met({"eval/math": value})


@pytest.mark.parametrize("text", ["eval/aime", "eval/aime>0.5", "eval/aime>=", ">=1", "eval/aime>=x", "eval/aime>=inf"])
def test_another_form_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"--stop-metric must be .* in quotes, since a shell .* 'eval/aime>=0.6'; got"):
        StopMetric.parse(text)


def test_a_run_knows_whether_its_metric_was_ever_logged():
    never = StopCheck(None)
    assert (never.text, never.was_logged, never.is_met({"eval/aime": 1.0})) == (None, True, False)
    check = StopCheck("eval/aime>=0.6")
    assert (check.text, check.is_met({"other": 1.0}), check.was_logged) == ("eval/aime>=0.6", False, False)
    assert (check.is_met({"eval/aime": 0.5}), check.was_logged) == (False, True)
    assert (check.is_met({"other": 1.0}), check.was_logged, check.is_met({"eval/aime": 0.6})) == (False, True, True)
