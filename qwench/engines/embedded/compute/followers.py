"""The further ranks of an engine of several devices, seen from rank 0: a process each (see `follower_process`).

    rank 0:   engine -> LeadingRunner, LeadingWeights -.-> its own part of the work
                                                       |  one pipe a rank: (what, name of a method, arguments)
    rank 1:   process: receive, call the method -------'-> its part; collectives join the parts (see `ranks`)

Rank 0 alone knows requests, plans steps and draws with limits. A rank whose pipe closes ends. A rank that fails sends the
reason and ends: then rank 0 leaves the group, its collectives raise, and the engine fails. The engine also fails when an
answer takes too long, when a signal stopped a rank for long, and when rank 0 fails in a step: the other ranks would wait in
its collectives.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench.engines.embedded.compute.batch import PackedStep
from qwench.engines.embedded.compute.decode_work import IntArray
from qwench.engines.embedded.compute.follower_process import HOST, START_TIMEOUT_S, Message, follow
from qwench.engines.embedded.compute.ranks import COLLECTIVE_TIMEOUT_S, RankGroup, Shard
from qwench.engines.embedded.compute.runner import InFlight, Runner, Sampled
from qwench.engines.embedded.compute.weights import WeightStore, is_of_adapter
from qwench.engines.embedded.scheduling.scheduler import StepPlan
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.errors import ConfigError, EngineError, WeightSyncError
from qwench.models.architecture import Architecture
from qwench.threads import daemon
from qwench.wire.flat_bucket import entries_of, flatten_into, size_bytes, unflatten
from qwench.wire.portions import WeightBucket
from qwench.wire.weight_group import listening_store

_logger = logging.getLogger(__name__)

END_TIMEOUT_S = 10.0
CLOSING_GRACE_S = 1.0
LOST_S = 10.0
LOOK_S = 1.0
STOPPED_S = 30.0
"""How long a rank may be stopped by a signal. A step of the others would wait for it as long as for a first use of NCCL."""
_context = multiprocessing.get_context("forkserver")


class Followers:
    """Ranks 1 and on, seen from rank 0."""

    def __init__(self, architecture: Architecture, settings: EmbeddedSettings) -> None:
        """Start the processes and join their group.

        Raises:
            ConfigError: what several devices do not support.
            EngineError: a rank did not start.
        """
        _check(architecture, settings)
        settings = settings.of_ranks()
        self._ended = "a rank of the engine does not answer."
        self._has_ended = threading.Event()
        self._left_at: float | None = None
        """When the group was left because a rank ended."""
        self._closing = threading.Event()
        self._turn = threading.Lock()
        """Of a thread that sends, until it has the answers: the event loop takes KV memory, a worker thread weights."""
        size = settings.num_devices
        store, port = listening_store(HOST, timeout_s=START_TIMEOUT_S)
        # On a CPU ranks are forked with PyTorch imported. CUDA does not live in a process that forks.
        _context.set_forkserver_preload([] if settings.device.startswith("cuda") else [__name__])
        self._pipes, self._processes = list[Connection](), list[multiprocessing.process.BaseProcess]()
        self._reasons = list[Connection]()
        """Why each rank failed. Apart from the answers: another thread may wait for those."""
        for rank in range(1, size):
            ours, theirs = _context.Pipe()
            reason, told = _context.Pipe(duplex=False)
            arguments = (theirs, told, architecture, settings, Shard(rank=rank, size=size), port)
            process = _context.Process(target=follow, args=arguments, name=f"qwench-engine-rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            told.close()
            self._pipes.append(ours)
            self._reasons.append(reason)
            self._processes.append(process)
        self.shard = Shard(size=size)
        try:
            self._wait_for_start()
            self.group = RankGroup(store, shard=self.shard, device=torch.device(settings.device))
            self.group.share_memory(self._pipes, hidden_size=architecture.hidden_size, dtype=settings.resolved_dtype)
        except RuntimeError as cause:
            self._end_processes()
            raise EngineError(f"the {size} ranks of the engine did not meet: {cause}") from cause
        except EngineError:
            self._end_processes()
            raise
        self._leaving = daemon("qwench-engine-leaves-ranks", self.group.abort)
        daemon("qwench-engine-ranks", self._watch).start()

    def tell(self, part: str, method: str, *arguments: object) -> None:
        """Make every rank call a method of its part; nothing is waited for.

        Raises:
            EngineError: a rank ended.
        """
        with self._turn:
            self._send((part, method, arguments, False))

    def ask(self, part: str, method: str, *arguments: object) -> list[Any]:  # what the method returns
        """Make every rank call a method of its part, and return what each returned.

        Raises:
            EngineError: a rank ended, or did not answer in time.
        """
        with self._turn:
            self._send((part, method, arguments, True))
            if self._closing.is_set():
                return []
            deadline = time.monotonic() + COLLECTIVE_TIMEOUT_S
            return [self._answer(rank, method, deadline) for rank in range(1, self.shard.size)]

    def _answer(self, rank: int, method: str, deadline: float) -> Any:  # what the method returns
        pipe = self._pipes[rank - 1]
        try:
            if pipe.poll(max(deadline - time.monotonic(), 0)):
                return pipe.recv()
        except (OSError, EOFError) as cause:
            raise self.failure() from cause
        # Its answer may still come. No later message may take that for its own.
        self._ended = f"rank {rank} of the engine did not answer {method!r} within {COLLECTIVE_TIMEOUT_S:g} s."
        self._has_ended.set()
        raise self.failure()

    def failure(self) -> EngineError:
        """Return the error of a rank that ended."""
        self._has_ended.wait(END_TIMEOUT_S)  # a broken pipe, or collective, is seen before the end of its process
        return EngineError(self._ended)

    def lost(self) -> EngineError | None:
        """Return the error of a rank that ended some time ago: a step that still waits for it, perhaps in NCCL, never ends."""
        return self.failure() if self._left_at is not None and time.monotonic() - self._left_at > LOST_S else None

    def _send(self, message: Message) -> None:
        if self._closing.is_set():
            return
        if self._has_ended.is_set():
            raise self.failure()
        try:
            for pipe in self._pipes:
                pipe.send(message)
        except OSError as cause:
            raise self.failure() from cause

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Make sure that the collectives of the block joined all ranks: those of a group that was left return anything.

        An error of rank 0 in the block ends the other ranks: they may wait in a collective that it does not reach.

        Raises:
            EngineError: a rank ended.
        """
        try:
            yield
        except Exception as cause:
            if isinstance(cause, RuntimeError):  # a collective raises before _watch sees the end of a rank
                self._has_ended.wait(2 * CLOSING_GRACE_S)
            if self._has_ended.is_set():
                raise self.failure() from cause
            self._ended = f"rank 0 of the engine failed: {type(cause).__name__}: {cause}"
            self._has_ended.set()
            for process in self._processes:
                process.kill()
            raise
        if self._has_ended.is_set():
            raise self.failure()

    def close(self) -> None:
        """End the processes and begin to leave the group; later messages, and calls of this, do nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._end_processes()
        self._leaving.start()

    def wait_until_left(self) -> None:
        """Wait for the end of `close`. NCCL leaves a group when the captured graphs that use it are gone, and not before."""
        if self._closing.is_set():
            self._leaving.join(END_TIMEOUT_S)
            if self._leaving.is_alive():
                _logger.warning("rank 0 of the engine did not leave the group of the ranks within %g s", END_TIMEOUT_S)

    def _wait_for_start(self) -> None:
        """Wait until every rank has reached the store.

        Raises:
            EngineError: one ended, or did not reach it in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        for rank, (pipe, process) in enumerate(zip(self._pipes, self._processes, strict=True), start=1):
            try:
                if not pipe.poll(max(deadline - time.monotonic(), 0)):
                    raise EngineError(f"rank {rank} of the engine did not start within {START_TIMEOUT_S:g} s.")
                pipe.recv()
            except (OSError, EOFError) as cause:
                process.join(END_TIMEOUT_S)
                why = f"rank {rank} of the engine ended while it started (exit code {process.exitcode})"
                raise EngineError(f"{why}{self._reason_of(rank)}; its log tells more.") from cause

    def _reason_of(self, rank: int) -> str:
        """Return what a rank that ended said, after a colon; empty where it said nothing."""
        reason = self._reasons[rank - 1]
        with suppress(OSError, EOFError):
            if reason.poll():
                return f": {reason.recv()}"
        return ""

    def _end_processes(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + END_TIMEOUT_S
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0))
            if process.exitcode is None:
                process.kill()
                process.join()

    def _watch(self) -> None:
        """Leave the group when a rank ends, or a collective would wait for it; end one that is stopped."""
        since = dict[int, float]()
        while not connection.wait([process.sentinel for process in self._processes], timeout=LOOK_S):
            self._end_stopped(since)
        # A signal to the process group ends ranks while the engine is being closed.
        if not self._closing.wait(CLOSING_GRACE_S):
            codes = {rank: process.exitcode for rank, process in enumerate(self._processes, start=1)}
            ended = [
                f"rank {rank} (exit code {code}){self._reason_of(rank)}" for rank, code in codes.items() if code is not None
            ]
            if not self._has_ended.is_set():
                self._ended = f"a rank of the engine ended: {', '.join(ended)}; its log tells more."
                self._has_ended.set()
            _logger.error("%s", self._ended)
            self._left_at = time.monotonic()
            self.group.abort()

    def _end_stopped(self, since: dict[int, float]) -> None:
        """Kill a rank that is stopped for too long; `since` keeps when each was first seen so."""
        for rank, process in enumerate(self._processes, start=1):
            if not _is_stopped(process.pid):
                since.pop(rank, None)
            elif time.monotonic() - since.setdefault(rank, time.monotonic()) > STOPPED_S and not self._closing.is_set():
                self._ended = f"rank {rank} of the engine was stopped by a signal for more than {STOPPED_S:g} s."
                self._has_ended.set()
                process.kill()


class LeadingRunner(Runner):
    """Rank 0's runner, which makes the others run the same."""

    def __init__(self, settings: EmbeddedSettings, weights: LeadingWeights, followers: Followers, model: Architecture) -> None:
        super().__init__(model.divided(followers.shard.size), settings, weights, ranks=followers.group)
        self._followers = followers

    def choose_num_pages(self) -> int:
        """See `Runner.choose_num_pages`; the device with the least free memory decides."""
        others: list[int] = self._followers.ask("runner", "choose_num_pages")
        return min(super().choose_num_pages(), *others)

    def allocate_kv_cache(self, num_pages: int) -> None:
        """See `Runner.allocate_kv_cache`."""
        self._followers.tell("runner", "allocate_kv_cache", num_pages)
        super().allocate_kv_cache(num_pages)

    def sleep(self) -> None:
        """See `Runner.sleep`."""
        self._followers.ask("runner", "sleep")
        super().sleep()

    def release_cached_memory(self) -> None:
        """See `Runner.release_cached_memory`."""
        self._followers.ask("runner", "release_cached_memory")
        super().release_cached_memory()

    def forget_bindings(self) -> None:
        """See `Runner.forget_bindings`."""
        self._followers.tell("runner", "forget_bindings")
        super().forget_bindings()

    def advance(self, plan: StepPlan | None, page_table: IntArray, before: InFlight | None) -> tuple[InFlight | None, Sampled]:
        """See `Runner.advance`."""
        with self._followers.joined():
            return super().advance(plan, page_table, before)

    def close(self) -> None:
        """See `Runner.close`; the other ranks are closed already."""
        super().close()
        self._followers.wait_until_left()

    def compute(self, step: PackedStep, *, has_adapters: bool) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """See `Runner.compute`."""
        self._followers.tell("runner", "follow", step)
        return super().compute(step, has_adapters=has_adapters)


class LeadingWeights(WeightStore):
    """Rank 0's weights: whole weights come to it, and each rank keeps its part."""

    def __init__(self, settings: EmbeddedSettings, followers: Followers, model: Architecture) -> None:
        device = torch.device(settings.device)
        super().__init__(model, settings.resolved_dtype, fp8=False, device=device, shard=followers.shard)
        self._followers = followers

    def reserve(self) -> None:
        """See `WeightStore.reserve`."""
        self._followers.tell("weights", "reserve")
        super().reserve()

    def begin(self) -> None:
        """See `WeightStore.begin`."""
        self._followers.tell("weights", "begin")
        super().begin()

    def load_bucket(self, bucket: WeightBucket) -> None:
        """See `WeightStore.load_bucket`."""
        if any(is_of_adapter(name) for name, _ in bucket):
            raise WeightSyncError("an engine of several GPUs takes no adapters; give --lora-publish merged.")
        self.check_bucket(bucket)
        entries = entries_of(bucket)
        buffer = torch.empty(size_bytes(entries), dtype=torch.uint8, device=self._device)
        flatten_into(buffer, bucket, entries)
        with self._followers.joined():
            self._followers.tell("bucket", "receive", entries)
            self._followers.group.broadcast(buffer)
        super().load_bucket(unflatten(buffer, entries))

    def finish(self) -> dict[str, int]:
        """See `WeightStore.finish`; also compares the checksums of all ranks."""
        checksums = super().finish()
        for rank, theirs in enumerate(self._followers.ask("weights", "finish"), start=1):
            if theirs != checksums:
                self.ready = False
                raise WeightSyncError(f"rank {rank} of the engine received other weights than rank 0; publish them again.")
        return checksums

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse: the trainer has no tensors of this form."""
        raise WeightSyncError("an engine of several GPUs cannot alias weights; copy them by update_weights instead.")

    def drop(self) -> None:
        """See `WeightStore.drop`."""
        self._followers.ask("weights", "drop")
        super().drop()


def divide(model: Architecture, settings: EmbeddedSettings) -> tuple[WeightStore, Runner, Followers | None]:
    """Return weights and runner of an engine; with several devices those of rank 0, and the other ranks.

    Raises:
        ConfigError: what several devices do not support.
        EngineError: a rank did not start.
    """
    if settings.num_devices == 1:
        device = torch.device(settings.device)
        store = WeightStore(model, settings.resolved_dtype, fp8=settings.fp8, device=device)
        return store, Runner(model, settings, store), None
    followers = Followers(model, settings)
    weights = LeadingWeights(settings, followers, model)
    return weights, LeadingRunner(settings, weights, followers, model), followers


def _is_stopped(pid: int | None) -> bool:
    """Tell whether a signal (SIGSTOP, SIGTSTP) stopped a process; False where the system does not say."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] == "T"
    return False


def _check(model: Architecture, settings: EmbeddedSettings) -> None:
    """Refuse what several devices do not support.

    Raises:
        ConfigError: with the reason.
    """
    model.divided(settings.num_devices)
    reasons = {
        "block-wise FP8 weights": settings.fp8,
        "--deterministic-mode": settings.batch_invariant or settings.inline,
    }
    for noun, is_asked in reasons.items():
        if is_asked:
            raise ConfigError(f"an engine of {settings.num_devices} GPUs does not support {noun}; give it one GPU")
