"""Where trainer ranks meet."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import TCPStore

from qwench.cluster.rendezvous import Rendezvous
from tests.deadlines import patient


def test_ranks_meet_at_a_port_of_their_own_that_the_driver_holds():
    places = [Rendezvous(), Rendezvous()]
    environs = [place.environ(2, 4, local_rank=1) for place in places]
    ports = [int(environ.pop("MASTER_PORT")) for environ in environs]
    expected = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    assert environs == [{**expected, "TORCHELASTIC_USE_AGENT_STORE": "True"}] * 2
    timeout = timedelta(seconds=patient(10))
    for number, port in enumerate(ports):
        TCPStore("127.0.0.1", port, is_master=False, timeout=timeout).set("said", str(number))
    told = [TCPStore("127.0.0.1", port, is_master=False, timeout=timeout).get("said") for port in ports]
    assert told == [b"0", b"1"]
