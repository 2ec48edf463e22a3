"""The process of one trainer rank on this machine: `python -m qwench.cluster.rank_process FD`, started by `cluster.local`.

A second thread listens to the driver: when the driver is gone, the rank ends at once, also in the middle of a collective.
A third one gives signs of life.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import queue
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from qwench.cluster.child import end_own_group, parent_connection
from qwench.cluster.local import RankStart
from qwench.cluster.messages import Answer, Call, Failure
from qwench.cluster.rank_host import RankHost
from qwench.observability.processes import dump_stacks_on_signal
from qwench.observability.stopping import leave_signals_to_driver, wake_with_parent
from qwench.threads import daemon
from qwench.wire.memory_files import leave_no_files, remove_folder

HEARTBEAT_S = 2.0


def main() -> None:
    """Answer calls until one is `close`."""
    faulthandler.enable()
    leave_signals_to_driver()
    driver = parent_connection(sys.argv[1])
    start: RankStart = pickle.loads(driver.recv_bytes())
    wake_with_parent()
    sys.path[:] = start.import_path
    dump_stacks_on_signal(start.stacks)
    start.heartbeat.touch()
    daemon("heartbeat", _beat, start.heartbeat).start()
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    daemon("driver", _listen, driver, messages, start.exchange_folder).start()
    host = RankHost(start.rank, exchange_folder=start.exchange_folder)
    closed = False
    while not closed:
        call = _decode(messages.get())
        closed = isinstance(call, Call) and call.method == "close"
        driver.send_bytes(_encode(host.answer(call) if isinstance(call, Call) else call))


def _listen(driver: Connection, messages: queue.SimpleQueue[bytes], exchange_folder: Path) -> None:
    try:
        while True:
            messages.put(driver.recv_bytes())
    except (EOFError, OSError):
        remove_folder(exchange_folder)
        leave_no_files()
        end_own_group()


def _beat(file: Path) -> None:
    """Say again and again that this process runs: one that is stopped, or held by native code, falls silent."""
    with suppress(FileNotFoundError):  # the driver closes
        while True:
            now = time.monotonic_ns()
            os.utime(file, ns=(now, now))
            time.sleep(HEARTBEAT_S)


def _decode(message: bytes) -> Call | Failure:
    """Return the call that was sent, or why it cannot be read here."""
    try:
        call = pickle.loads(message)
        if isinstance(call, Path):
            call = pickle.loads(call.read_bytes())
    except Exception as error:  # noqa: BLE001 - the border of the process: what was sent may name what is not here
        return Failure.of(error)
    assert isinstance(call, Call), f"the driver sends calls, got {call!r}"
    return call


def _encode(answer: Answer | Failure) -> bytes:
    try:
        return pickle.dumps(answer)
    except Exception as error:  # noqa: BLE001 - the border of the process: a result may not be picklable
        return pickle.dumps(Failure.of(error))


if __name__ == "__main__":
    main()
