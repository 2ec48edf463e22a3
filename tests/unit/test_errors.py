import errno
import pickle
from socket import EAI_NONAME, gaierror

import pytest

from qwench.errors import Stopped, cannot_listen, counted


@pytest.mark.parametrize(("count", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (2000, "2,000 steps")])
def test_a_count_has_its_noun(count, text):
    assert counted(count, "step") == text


@pytest.mark.parametrize(
    ("cause", "flag", "said"),
    [
        (OSError(errno.EADDRINUSE, "error: in use"), "--port", "Address already in use); choose another with --port."),
        (gaierror(EAI_NONAME, "Name or service not known"), None, "Name or service not known); end what holds it."),
        (OSError("odd"), None, "odd); end what holds it."),
    ],
)
def test_a_port_that_cannot_be_listened_on_says_how_to_choose_another(cause, flag, said):
    assert cannot_listen("the router", "::1", 80, cause, flag=flag) == f"the router cannot listen on ::1 port 80 ({said}"


def test_a_stop_travels_between_processes():
    for stop in (Stopped(15, "saved"), pickle.loads(pickle.dumps(Stopped(15, "saved")))):
        assert (stop.number, stop.outcome, stop.args) == (15, "saved", (15, "saved"))
    assert Stopped(2).outcome == ""
