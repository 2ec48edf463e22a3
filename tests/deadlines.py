"""The one place that scales how long tests wait. A longer deadline costs nothing, because a test that passes does not reach it.

QWENCH_TEST_PATIENCE overrides the factor, for machines that are slower still.
"""

from __future__ import annotations

import os

_PATIENCE = float(os.environ.get("QWENCH_TEST_PATIENCE", "5"))
"""How much slower than an idle machine with two cores a test may run."""


def patient(seconds: float) -> float:
    """Return the deadline of something that is done within `seconds` on an idle machine."""
    return seconds * _PATIENCE
