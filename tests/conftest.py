"""What holds for all tests: patient deadlines, no open log, and signals that reach the processes that tests start."""

from __future__ import annotations

import gc
import logging
import signal

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests import warm_start
from tests.deadlines import patient

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("first failure", settings.get_profile("patient"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("patient")

# `nohup` and a shell's `&` start a process that ignores these, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

warm_start.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End a test that hangs, on a busy machine later than on an idle one."""
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(patient(300)))


def pytest_collection_finish() -> None:
    """Leave what has been imported out of the collections of garbage that tests ask for: each would look at all of it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_open_log() -> None:
    """Close the log that a verb opened in an earlier test: its level would hide messages from this one."""
    package = logging.getLogger("qwench")
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    package.setLevel(logging.NOTSET)
