"""The process of one trainer rank on this machine: `python -m qwench.cluster.rank_process FD`, started by `cluster.local`.

A second thread listens to the driver: when the driver is gone, the rank ends at once, also in the middle of a collective.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import queue
import shutil
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from qwench.cluster.child import end_own_group, parent_connection
from qwench.cluster.local import RankStart
from qwench.cluster.messages import Answer, Call, Failure
from qwench.cluster.rank_host import RankHost
from qwench.wire.shared_buffer import remove_buffers_of


def main() -> None:
    """Answer calls until one is `close`."""
    faulthandler.enable()
    driver = parent_connection(sys.argv[1])
    start: RankStart = pickle.loads(driver.recv_bytes())
    sys.path[:] = start.import_path
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(driver, messages, start.exchange_folder), name="driver", daemon=True).start()
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
        shutil.rmtree(exchange_folder, ignore_errors=True)
        remove_buffers_of(os.getpid())
        end_own_group()


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
