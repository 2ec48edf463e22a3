"""Publication to engines in other processes; every trainer rank runs it.

    weights() on all ranks -> first bucket -> routes -> for each bucket: offer, load -> every engine confirms

All ranks gather every bucket; only those on an engine's device, or rank 0, send. A failure of one rank is raised on all.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.kinds import KINDS
from qwench.engines.kinds.receiver import Receiver
from qwench.engines.ledger import Ledger, noted
from qwench.engines.protocol import Portion
from qwench.errors import EngineLostError, QwenchError, WeightSyncError
from qwench.files import written
from qwench.models.hf import write_hf_checkpoint
from qwench.models.peft import SCALE, write_adapter
from qwench.weights.broadcast import BroadcastLink
from qwench.weights.exchange import Message, RankExchange
from qwench.weights.local import WeightSource
from qwench.weights.plan import PublicationPlan
from qwench.weights.routes import Route, plan_routes
from qwench.wire.addresses import EngineAddress, Placement, placement_of
from qwench.wire.flat_bucket import TensorEntry, entries_of, flatten_into, size_bytes
from qwench.wire.portions import WeightBucket
from qwench.wire.shared_buffer import BufferRing, SharedBuffer

Answer = TypeVar("Answer")


def publish_from_rank(
    source: WeightSource,
    addresses: Sequence[EngineAddress],
    version: int,
    plan: PublicationPlan,
    *,
    link: BroadcastLink | None = None,
) -> None:
    """Make the engines at `addresses` hold the source's weights under `version`; collective over the trainer's ranks.

    Args:
        link: kept from one publication to the next; None: a link for this one.

    Raises:
        WeightSyncError: an engine refused the weights, holds something else afterwards, or cannot be reached that way.
        EngineLostError: an engine is gone or did not answer within its deadline.
    """
    source, bucket_bytes = plan.source_of(source), plan.engine.update_weight_buffer_size
    buckets = iter(source.weights(bucket_bytes=bucket_bytes, part=plan.part))
    first = next(buckets, None)
    assert first, "a model without weights cannot be published"
    with ExitStack() as stack:
        loop = EventLoopThread("qwench-publication")
        stack.callback(loop.close)
        if link is None:
            link = BroadcastLink()
            stack.callback(link.close)
        publication = _Publication(loop, link, addresses, version, plan)
        stack.callback(publication.close)
        publication.choose_routes(first[0][1].device)
        buckets = chain([first], buckets)
        del first  # the chain drops a bucket when the next one comes
        if publication.serves("ipc", "broadcast"):
            publication.send(buckets)
            buckets = source.weights(bucket_bytes=bucket_bytes, part=plan.part)
        if publication.serves("disk"):
            publication.send_folder(buckets)
        publication.confirm()


_Served = Sequence[tuple[int, Route, Receiver]]
"""Number, route and connection of each engine that this rank takes part in serving."""


class _IpcSender:
    """Offers this rank's buckets to the engines on its device, and asks those whose first rank it serves to load them."""

    def __init__(self, rank: int, served: _Served, loop: EventLoopThread) -> None:
        self._rank = rank
        self._served = served
        self._loop = loop
        self._loading: list[list[Future[None]]] = []
        """The engines' answers to each bucket that was started."""

    def offers(self, buffer: SharedBuffer, entries: Sequence[TensorEntry]) -> dict[str, str]:
        """Return what the engines' ranks on this rank's device need, by `engine:tensor-parallel rank`."""
        return {
            f"{number}:{tp_rank}": receiver.offer(buffer, entries)
            for number, route, receiver in self._served
            for tp_rank, rank in enumerate(route.ranks)
            if rank == self._rank
        }

    def start(self, offers: Mapping[str, str], portion: Portion) -> None:
        """Ask engines to load what all ranks offered."""
        answers = []
        for number, route, receiver in self._served:
            if route.ranks[0] == self._rank:
                own = [offers[f"{number}:{tp_rank}"] for tp_rank in range(len(route.ranks))]
                answers.append(self._loop.start(receiver.take_shared(own, portion)))
        self._loading.append(answers)

    def wait(self, *, left: int = 0) -> None:
        """Return when the engines have loaded all buckets but the `left` newest.

        Raises:
            WeightSyncError: one refused it.
            EngineError: one failed or did not answer in time.
        """
        while len(self._loading) > left:
            for answer in self._loading.pop(0):
                answer.result()


@dataclass
class _Parcel:
    """One rank's part of a bucket."""

    entries: Sequence[TensorEntry] = ()
    offers: dict[str, str] = field(default_factory=dict)
    """See `_IpcSender.offers`."""
    content: Tensor | None = None
    """The flat bucket, if this rank sends any; it lies in a buffer of the ring."""


class _Publication:
    """One rank's part in one publication: plan -> (send | send_folder)* -> confirm -> close."""

    def __init__(
        self,
        loop: EventLoopThread,
        link: BroadcastLink,
        addresses: Sequence[EngineAddress],
        version: int,
        plan: PublicationPlan,
    ) -> None:
        self._exchange = RankExchange()
        self._loop = loop
        self._link = link
        self._addresses = addresses
        self._version = version
        self._plan = plan
        self._receivers = [KINDS[address.kind].receiver(address, timeout_s=plan.timeout_s) for address in addresses]
        self._routes: list[Route] = []
        self._ledgers: dict[str, Ledger] = {}

    def serves(self, *transports: str) -> bool:
        """Tell whether an engine gets its weights one of these ways."""
        return any(route.transport in transports for route in self._routes)

    def choose_routes(self, device: torch.device) -> None:
        """Choose every engine's route; rank 0 asks the engines where they are."""
        engines: list[Message | None] = []
        failure = None
        if self._exchange.rank == 0:
            failure = _failure_of(lambda: engines.extend(self._ask_placements()))
        told = self._exchange.gather({"rank": asdict(placement_of(device)), "engines": engines}, failure=failure)
        self._routes = plan_routes(
            self._addresses,
            [None if engine is None else _placement(engine) for engine in told[0]["engines"]],
            [_placement(one["rank"]) for one in told],
            transport="disk" if self._plan.named is not None else self._plan.engine.update_weight_transport,
        )
        self._exchange.gather({}, failure=_failure_of(self._open))

    def send(self, buckets: Iterable[WeightBucket]) -> None:
        """Bring every bucket to the engines that take buckets; as many are under way at once as every engine takes.

        A buffer is filled again when every rank knows that all engines have loaded its content.
        """
        ipc = _IpcSender(self._exchange.rank, self._served("ipc"), self._loop)
        window = self._window()
        ring = BufferRing(window + 1, bucket_bytes=self._plan.engine.update_weight_buffer_size)

        def wait(left: int) -> QwenchError | None:
            return _failure_of(lambda: ipc.wait(left=left)) or _failure_of(lambda: self._link.wait(left=left))

        failure: QwenchError | None = None
        try:
            for portion, bucket in self._numbered(noted(buckets, self._ledgers.values())):
                parcel = _Parcel()
                failure = failure or _failure_of(lambda: self._pack(parcel, bucket, ring, ipc))  # noqa: B023 - called here
                # The first bucket begins a publication, also one that comes again: no other may overtake it.
                left = 0 if portion.index == 1 else window - 1
                told = self._exchange.gather({"offers": parcel.offers}, failure=failure or wait(left=left))
                ipc.start({key: offer for one in told for key, offer in one["offers"].items()}, portion)
                if parcel.content is not None and self._sends_broadcasts:
                    failure = _failure_of(lambda: self._start_broadcast(parcel, portion))  # noqa: B023 - called here
            self._exchange.gather({}, failure=failure or wait(left=0))
        except BaseException:
            self._link.abandon()
            raise
        finally:
            ring.close()

    def send_folder(self, buckets: Iterable[WeightBucket]) -> None:
        """Write a checkpoint, or an adapter, on rank 0; the engines that need one read it."""
        served = self._served("disk")
        failure = None
        if self._exchange.rank == 0:
            failure = _failure_of(lambda: self._write_and_load(buckets, served))
        else:
            for _ in buckets:
                pass
        self._exchange.gather({}, failure=failure)

    def confirm(self) -> None:
        """Ask every engine what it holds now; the rank that served it asks. An adapter was named when it was loaded."""
        if self._plan.named is not None:
            return

        async def ask() -> None:
            confirming = (
                receiver.confirm(self._ledgers[receiver.ledger_kind], version=self._version) for receiver in self._asked()
            )
            await asyncio.gather(*confirming)

        label, timeout_s = f"confirm weight version {self._version}", self._plan.total_timeout_s
        self._exchange.gather({}, failure=_failure_of(lambda: self._loop.run(ask(), label=label, timeout_s=timeout_s)))

    def close(self) -> None:
        """Close the connections to the engines."""

        async def close() -> None:
            await asyncio.gather(*(receiver.close() for receiver in self._receivers))

        self._loop.run(close(), label="close connections to engines", timeout_s=self._plan.timeout_s)

    @property
    def _sends_broadcasts(self) -> bool:
        return self._exchange.rank == 0 and self.serves("broadcast")

    def _window(self) -> int:
        """Return how many buckets every engine takes at once; the same on all ranks."""
        numbered = enumerate(self._routes)
        return min(self._receivers[i].window(route.transport) for i, route in numbered if route.transport != "disk")

    def _asked(self) -> list[Receiver]:
        """Return the engines whose requests this rank sends."""
        return [receiver for _, route, receiver in self._served() if route.ranks[0] == self._exchange.rank]

    def _served(self, *transports: str) -> _Served:
        """Return the engines that this rank takes part in serving."""
        return [
            (number, route, self._receivers[number])
            for number, route in enumerate(self._routes)
            if self._exchange.rank in route.ranks and (not transports or route.transport in transports)
        ]

    def _ask_placements(self) -> list[Message | None]:
        known = self._ask([receiver.placement() for receiver in self._receivers], "its devices")
        return [None if one is None else asdict(one) for one in known]

    def _ask(self, questions: Sequence[Coroutine[Any, Any, Answer]], what: str) -> list[Answer]:
        """Return the engines' answers.

        Raises:
            EngineLostError: one did not answer within its deadline, which may be shorter than that of its client.
        """

        async def ask() -> list[Answer]:
            try:
                async with asyncio.timeout(self._plan.timeout_s):
                    return list(await asyncio.gather(*questions))
            except TimeoutError as error:
                raise EngineLostError(f"an engine did not tell {what} within {self._plan.timeout_s:g} s.") from error

        return self._loop.run(ask(), label=f"ask engines for {what}", timeout_s=self._plan.total_timeout_s)

    def _open(self) -> None:
        self._ask([receiver.open() for receiver in self._asked()], "its size")
        self._ledgers = {receiver.ledger_kind: receiver.make_ledger() for receiver in self._asked()}

    def _numbered(self, buckets: Iterable[WeightBucket]) -> Iterator[tuple[Portion, WeightBucket]]:
        iterator = iter(buckets)
        bucket: WeightBucket | None = next(iterator)
        index = 0
        while bucket is not None:
            following = next(iterator, None)
            yield Portion(version=self._version, index=index, final=following is None), bucket
            index, bucket = index + 1, following

    def _pack(self, parcel: _Parcel, bucket: WeightBucket, ring: BufferRing, ipc: _IpcSender) -> None:
        """Copy a bucket into a buffer, if this rank sends any."""
        if not self._served("ipc") and not self._sends_broadcasts:
            return
        parcel.entries = entries_of(bucket)
        buffer = ring.next(size_bytes(parcel.entries), bucket[0][1].device)
        flatten_into(buffer.tensor, bucket, parcel.entries)
        parcel.offers = ipc.offers(buffer, parcel.entries)
        parcel.content = buffer.tensor[: size_bytes(parcel.entries)]

    def _start_broadcast(self, parcel: _Parcel, portion: Portion) -> None:
        assert parcel.content is not None, "rank 0 packs what it sends"
        receivers = [receiver for _, _, receiver in self._served("broadcast")]
        timeout_s = self._plan.timeout_s
        self._link.start(parcel.content, parcel.entries, portion, receivers, loop=self._loop, timeout_s=timeout_s)

    def _write_and_load(self, buckets: Iterable[WeightBucket], served: _Served) -> None:
        plan, engine = self._plan, self._plan.engine
        shared = engine.update_weight_disk_dir
        parent = Path(shared) if shared is not None else Path(tempfile.mkdtemp(prefix="qwench-weights-"))
        folder = parent / f"weights_{self._version:07d}"
        try:
            with written(f"--update-weight-disk-dir {parent}", folder):
                self._write(folder, buckets)
            if plan.after_write is not None:
                plan.after_write(folder.resolve(), [self._addresses[number].base_url for number, _, _ in served])

            async def load() -> None:
                await asyncio.gather(*(self._load_folder(receiver, folder.resolve()) for _, _, receiver in served))

            self._loop.run(load(), label="load weights from disk", timeout_s=2 * plan.timeout_s)
        finally:
            if not engine.update_weight_disk_keep_files:
                shutil.rmtree(folder if shared is not None else parent, ignore_errors=True)

    def _write(self, folder: Path, buckets: Iterable[WeightBucket]) -> None:
        if self._plan.named is not None:
            folder.mkdir(parents=True, exist_ok=True)
            matrices = {name: matrix.cpu() for bucket in buckets for name, matrix in bucket if name != SCALE}
            write_adapter(folder, self._plan.named.config, matrices)
            return
        if self._plan.model_folder is None:
            raise WeightSyncError("publication from disk needs the folder of --hf-checkpoint, for the config.")
        write_hf_checkpoint(folder, noted(buckets, self._ledgers.values()), source=self._plan.model_folder)

    async def _load_folder(self, receiver: Receiver, folder: Path) -> None:
        named = self._plan.named
        if named is None:
            await receiver.take_folder(folder, version=self._version)
        else:
            await receiver.take_adapter(folder, named.name, version=self._version, retired=named.retired)


def _failure_of(work: Callable[[], None]) -> QwenchError | None:
    """Do the work and return its error, which the other ranks must get first."""
    try:
        work()
    except QwenchError as failure:
        return failure
    return None


def _placement(told: Message) -> Placement:
    return Placement(host=told["host"], devices=tuple(told["devices"]))
