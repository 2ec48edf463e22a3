"""What holds for all tests: no deadline for single examples of hypothesis, and a patient one for each test."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.deadlines import patient

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End a test that hangs, on a busy machine later than on an idle one."""
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(patient(300)))
