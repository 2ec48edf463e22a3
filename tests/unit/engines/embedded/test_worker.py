"""The end of a process whose engine has work that never ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import weakref

import pytest

from qwench.engines.embedded.worker import Worker
from qwench.errors import EngineError
from tests.deadlines import patient

LOST = """
import asyncio, atexit, threading
from qwench.engines.embedded import worker
from qwench.errors import EngineError

worker.LOOK_S, worker.END_TIMEOUT_S = 0.01, 1
end_of_device = threading.Event()
atexit.register({end})
lost = worker.Worker(inline=False, lost=lambda: EngineError("rank 1 ended"))
try:
    asyncio.run(lost.call(threading.Event().wait))
except EngineError as error:
    print(error, lost.is_lost)
{close}
"""


@pytest.mark.parametrize("close", ["lost.close()", ""])
@pytest.mark.parametrize(("end", "status"), [("end_of_device.set", 0), ("end_of_device.wait", -signal.SIGALRM)])
def test_a_process_ends_though_its_engine_is_in_a_collective(end, status, close):
    script = LOST.format(end=end, close=close)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=patient(10), check=False)
    assert (ended.returncode, ended.stdout) == (status, "rank 1 ended True\n")
    assert "SIGALRM ends this process in 1 s" in ended.stderr


def test_work_returns_raises_and_is_not_kept():
    class Result:
        pass

    async def scenario():
        worker = Worker(inline=False)
        result = await worker.call(Result)
        is_kept = weakref.ref(result)
        with pytest.raises(ZeroDivisionError):
            await worker.call(lambda: 1 // 0)
        del result
        assert await worker.call(is_kept) is None
        worker.close()
        assert worker._thread is not None
        worker._thread.join(patient(1))
        return worker.is_lost, worker._thread.is_alive()

    assert asyncio.run(scenario()) == (False, False)


@pytest.mark.parametrize("has_worked", [True, False])
def test_work_for_a_closed_engine_is_refused_and_not_waited_for(has_worked):
    async def scenario():
        worker = Worker(inline=False)
        if has_worked:
            await worker.call(int)
        worker.close()
        await worker.call(int)

    with pytest.raises(EngineError, match="closed"):
        asyncio.run(scenario())
