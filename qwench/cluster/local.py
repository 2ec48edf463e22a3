"""Trainer ranks as processes of this machine: one child each; calls that are large go through files in shared memory."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from qwench.cluster.buckets import make_exchange_folder
from qwench.cluster.child import ChildProcess
from qwench.cluster.messages import Call, Death, RankReply
from qwench.cluster.rendezvous import Rendezvous
from qwench.files import written
from qwench.observability.processes import STACKS_SIGNAL, ask_for_stacks, forget, register
from qwench.threads import usable_cores
from qwench.wire.memory_files import remove_files_of, remove_folder

_logger = logging.getLogger(__name__)
_INLINE_BYTES = 32 * 1024  # fits a pipe's buffer, so that sending never waits for a rank
_EXIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStart:
    """The first message: what a rank's process must know before its first call."""

    rank: int
    import_path: Sequence[str]
    """`sys.path` of the driver: the user's own functions are found where the driver finds them."""
    exchange_folder: Path

    @property
    def heartbeat(self) -> Path:
        """Return the file that the rank touches: its time of change is that of the clock `time.monotonic`."""
        return self.exchange_folder / f"rank_{self.rank}.beat"

    @property
    def stacks(self) -> Path:
        """Return the file that the rank writes its stacks to when it is asked."""
        return self.exchange_folder / f"rank_{self.rank}.stacks"


class WatchedRank:
    """A rank's process as `observability.processes` watches it."""

    def __init__(self, start: RankStart, pid: int) -> None:
        self.label = f"trainer rank {start.rank}"
        self._start, self._pid = start, pid

    def silent_s(self) -> float:
        """See `Part.silent_s`; 0 until the rank has started."""
        try:
            return (time.monotonic_ns() - self._start.heartbeat.stat().st_mtime_ns) / 1e9
        except FileNotFoundError:
            return 0.0

    def stacks(self) -> str:
        """See `Part.stacks`."""
        if not self._start.stacks.exists():  # until then the signal would end it
            return "(the process is starting)"
        return ask_for_stacks(lambda: os.kill(self._pid, STACKS_SIGNAL), self._start.stacks)


class LocalRanks:
    """See the module docstring and `workers.Ranks`."""

    def __init__(self, size: int, *, environ: Mapping[str, str], bucket_bytes: int, log_folder: Path | None) -> None:
        """Start `size` processes.

        Args:
            environ: The driver's environment; each rank's also says which rank it is.
            bucket_bytes: Size of the buckets of weights that will be asked for.
            log_folder: Takes `rank_<r>.log`, what each rank writes; None: only its last lines are kept.
        """
        self._rendezvous = Rendezvous()
        self._calls_sent = 0
        self._closing = self._ended = False
        self._reported: set[int] = set()
        self._watched: list[WatchedRank] = []
        if log_folder is not None:
            with written(f"the folder of the ranks' logs, {log_folder},", log_folder):
                log_folder.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // size)), **environ}
        self._children = [
            ChildProcess(
                environ={**threads, **self._rendezvous.environ(rank, size, local_rank=rank)},
                log_file=log_folder / f"rank_{rank}.log" if log_folder is not None else None,
                say=partial(_logger.info, "[rank 0] %s") if rank == 0 else None,
            )
            for rank in range(size)
        ]
        self._folder = make_exchange_folder(bucket_bytes)  # last: a driver that dies before a rank knows the folder leaves it
        for rank, child in enumerate(self._children):
            start = RankStart(rank=rank, import_path=sys.path, exchange_folder=self._folder)
            self._send_to(child, pickle.dumps(start))
            self._watched.append(WatchedRank(start, child.pid))
        for process in self._watched:
            register(process)

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return len(self._children)

    @property
    def pids(self) -> list[int]:
        """Return the process id of each rank."""
        return [child.pid for child in self._children]

    def send(self, call: Call) -> None:
        """Give every rank the call; see `Ranks.send`."""
        self._closing = call.method == "close"
        message = pickle.dumps(call)
        if len(message) > _INLINE_BYTES:
            self._call_file(self._calls_sent - 1).unlink(missing_ok=True)  # every rank has answered that one
            path = self._call_file(self._calls_sent)
            path.write_bytes(message)
            message = pickle.dumps(path)
        self._calls_sent += 1
        for child in self._children:
            self._send_to(child, message)

    def receive(self, timeout_s: float) -> list[tuple[int, RankReply]]:
        """Return answers and deaths; see `Ranks.receive`."""
        waiting = {child.connection: rank for rank, child in enumerate(self._children) if rank not in self._reported}
        ready = wait(list(waiting), timeout=timeout_s)
        replies: list[tuple[int, RankReply]] = []
        for connection, rank in waiting.items():
            child = self._children[rank]
            # A rank that has answered and then died is found dead at the next call.
            if connection in ready:
                try:
                    replies.append((rank, pickle.loads(child.connection.recv_bytes())))
                except (EOFError, OSError):
                    replies.append((rank, self._death(rank)))
            elif child.has_ended():
                replies.append((rank, self._death(rank)))
        return replies

    def end(self) -> None:
        """End every process; those that were asked to close may do so themselves. See `Ranks.end`."""
        if self._ended:
            return
        self._ended = True
        for process in self._watched:
            forget(process)
        remove_folder(self._folder)  # now: a second signal may end this process while it waits
        for child in self._children:
            if self._closing:
                child.wait(_EXIT_TIMEOUT_S)
            child.kill()
            remove_files_of(child.pid)

    def _death(self, rank: int) -> Death:
        self._reported.add(rank)
        child = self._children[rank]
        child.wait(_EXIT_TIMEOUT_S)  # its end of the pipe closes a little before
        child.kill()
        return Death(reason=child.how_it_ended(), output=child.last_output())

    def _call_file(self, number: int) -> Path:
        return self._folder / f"call_{number}"

    def _send_to(self, child: ChildProcess, message: bytes) -> None:
        with suppress(OSError):  # it has ended, which `receive` tells better
            child.connection.send_bytes(message)
