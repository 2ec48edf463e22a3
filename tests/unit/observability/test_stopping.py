import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from qwench.errors import Stopped
from qwench.observability.stopping import ended_by_signals, interruptible, stop_requested, stops_deferred
from tests.deadlines import patient


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # the handler runs between two instructions of this thread


@pytest.fixture(autouse=True)
def usual_handlers():
    """Begin with those of a fresh process, also where the tests were started with nohup."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_verb_as_an_exception(number):
    with pytest.raises(Stopped) as stopped, ended_by_signals():
        send(number)
    assert stopped.value.number == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_deferred_signal_waits_until_the_run_asks_or_can_be_interrupted(number):
    reached = []
    with pytest.raises(Stopped) as stopped, stops_deferred():
        assert stop_requested() is None
        send(number)
        reached.append("after the signal")
        assert stop_requested() == number
        with interruptible():
            reached.append("never")
    assert reached == ["after the signal"] and stopped.value.number == number


def test_signals_end_the_verb_again_after_a_block_that_deferred_them():
    with pytest.raises(Stopped), ended_by_signals():
        with stops_deferred():
            assert stop_requested() is None
        send(signal.SIGTERM)
        pytest.fail("the signal was only noted")


def test_a_signal_in_the_middle_of_an_interruptible_wait_ends_it():
    waiting = threading.Event()
    with pytest.raises(Stopped), stops_deferred(), interruptible():
        threading.Timer(0.05, send, [signal.SIGTERM]).start()
        waiting.wait(patient(30))
        pytest.fail("the wait went on")


@pytest.mark.parametrize(("pause_s", "code"), [(0.0, 7), (0.3, 143)])
def test_a_second_signal_ends_the_process_at_once_and_an_echo_of_the_first_does_not(pause_s, code):
    program = (
        "import os, signal, time\nfrom qwench.observability import stopping\nstopping.REPEAT_S = 0.2\n"
        "with stopping.stops_deferred():\n"
        f"    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep({pause_s})\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(1)\n    os._exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == code


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stops_deferred():
            send(signal.SIGHUP)
            assert stop_requested() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("inner", [nullcontext, stops_deferred])
def test_handlers_are_given_back_also_after_a_signal(inner):
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(Stopped), ended_by_signals(), inner(), interruptible():
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in numbers] == before
    with stops_deferred():
        assert stop_requested() is None, "an earlier run's signal is not this one's"


def test_without_a_signal_the_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with stops_deferred():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_is_not_interrupted():
    outcome = []

    def work() -> None:
        with interruptible():
            outcome.append("done")

    with stops_deferred():
        send(signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert outcome == ["done"]
