"""The owner of publication: brings the trainer's weights to the engines, restarted engines included.

publish:    pool.receiving(version): engines in other processes by `remote`, engines of this process by `local`
attend:     wait for generation; when every engine was restarted, none has the weights: republish, then wait again
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from qwench.engines.fleet.pool import EnginePool, EngineRestartedError
from qwench.engines.kinds import KINDS
from qwench.engines.protocol import AddressedEngine, Engine
from qwench.errors import EngineError
from qwench.observability.timing import PhaseTimer
from qwench.observability.waiting import Describe, say_nothing, waiting
from qwench.weights.local import WeightSource, send_alias, send_copies, shared_weights_for
from qwench.weights.plan import PublicationPlan
from qwench.wire.addresses import EngineAddress
from qwench.wire.portions import WeightPart

_logger = logging.getLogger(__name__)
_FORGET_TIMEOUT_S = 30.0
Result = TypeVar("Result")


class PublishedModel(WeightSource, Protocol):
    """The trained model as the publisher needs it: its weights, and its memory on the devices."""

    def sleep(self) -> None:
        """Free device memory."""
        ...

    def wake(self) -> None:
        """Take device memory again."""
        ...

    def release_cache(self) -> None:
        """Give other processes the device memory that torch caches."""
        ...

    def publish(self, addresses: Sequence[EngineAddress], version: int, plan: PublicationPlan) -> None:
        """Run `publish_from_rank` on every trainer rank."""
        ...


class Devices(Protocol):
    """Who holds device memory, and when (`cluster.gpus`)."""

    weights_may_alias: bool

    def held_by(self, model: PublishedModel) -> AbstractContextManager[None]:
        """Give the devices to the learner inside the context."""
        ...

    def keep_for(self, model: PublishedModel) -> None:
        """Give the devices to the learner for the rest of the run."""
        ...


class Publisher:
    """See the module docstring. Called by the thread of the main loop."""

    def __init__(
        self,
        model: PublishedModel,
        pool: EnginePool | None,
        plan: PublicationPlan,
        *,
        gpus: Devices,
        timer: PhaseTimer,
    ) -> None:
        """Keep both ends.

        Args:
            pool: None: a run without engines; publishing does nothing.
        """
        self._model = model
        self._pool = pool
        self._plan = plan
        self._gpus = gpus
        self._timer = timer
        self._version = 0
        self._based: set[object] = set()
        """Engines, with their number of starts, that hold the frozen weights of the last publication."""
        self._names: tuple[str, ...] = ()
        """Of adapters that engines may hold."""

    def advance(self, *, version: int) -> None:
        """Note that the learner now holds `version`, the number of rollouts it learned from."""
        self._version = version

    def publish(self, *, version: int) -> None:
        """Make every engine sample with the learner's weights from now on, under `version`.

        Nothing may be generating. If an engine is lost, it is restarted, and the publication begins again, once.

        Raises:
            WeightSyncError: an engine holds other weights than those sent.
            EngineError: an engine did not answer in time, or did not restart.
        """
        self.advance(version=version)
        with self._timer.phase("update_weights"):
            if self._pool is None:
                return
            try:
                self._send(self._pool, version)
            except EngineRestartedError as error:
                _logger.warning("weight version %d is published again: %s", version, error)
                self._send(self._pool, version)

    def republish(self) -> None:
        """Publish the current weights again, after every engine was restarted while it generated."""
        _logger.warning("no engine holds the current weights any more; they are published again")
        with self._gpus.held_by(self._model):
            self.publish(version=self._version)

    def forget_adapters(self) -> None:
        """Ask engines that outlive the run to unload its adapters. An engine that does not answer keeps them."""
        names, self._names = self._names, ()
        if self._pool is None or not names:
            return
        addresses = [engine.address for engine in self._pool.engines if isinstance(engine, AddressedEngine)]

        async def forget(address: EngineAddress) -> None:
            receiver = KINDS[address.kind].receiver(address, timeout_s=_FORGET_TIMEOUT_S)
            try:
                for name in names:
                    await receiver.forget_adapter(name)
            except EngineError as error:
                _logger.warning("an adapter of this run stays loaded: %s", error)
            finally:
                await receiver.close()

        async def forget_all() -> None:
            await asyncio.gather(*map(forget, addresses))

        # Later than the requests' own deadlines, which end in a warning.
        self._pool.loop.run(forget_all(), label="unload adapters", timeout_s=(len(names) + 1) * _FORGET_TIMEOUT_S)

    def attend(
        self,
        coroutine: Coroutine[Any, Any, Result],
        *,
        label: str,
        timeout_s: float | None,
        describe: Describe = say_nothing,
    ) -> Result:
        """Run a coroutine that generates on the engines' loop and wait for its result; republish when it needs that.

        Raises:
            EngineError: the deadline passed; the coroutine is cancelled. Its own errors come through as they are.
        """
        assert self._pool is not None, "a run without engines generates nothing"
        working = self._pool.loop.under_way(coroutine, label=label, timeout_s=timeout_s, describe=describe)
        with self._pool.explaining(), working as work, waiting(label, describe):
            while not work.ends_before(self._pool.lose_weights()):
                self.republish()
            return work.result()

    def _send(self, pool: EnginePool, version: int) -> None:
        """Send the weights to all engines, once."""
        engines = {_start_of(engine) for engine in pool.engines}
        plan, label = self._plan_for(engines, version), f"publish weight version {version}"
        name = None if plan.named is None else plan.named.name
        with waiting(label), pool.receiving(version, adapter=name):
            if addresses := [engine.address for engine in pool.engines if isinstance(engine, AddressedEngine)]:
                self._model.publish(addresses, version, plan)
            if local := [engine for engine in pool.engines if not isinstance(engine, AddressedEngine)]:
                pool.loop.run(self._sending(local, version, plan), label=label, timeout_s=plan.total_timeout_s)
        self._based = engines
        self._names = self._names[-1:]

    def _sending(self, engines: Sequence[Engine], version: int, plan: PublicationPlan) -> Coroutine[object, object, None]:
        """Return the coroutine that sends the weights to engines of this process."""
        source, part, bucket_bytes = plan.source_of(self._model), plan.part, plan.engine.update_weight_buffer_size
        stays = part == "apart" and not plan.frozen_moves
        may_share = part != "adapter" and (stays or self._gpus.weights_may_alias)
        shared = shared_weights_for(engines, source, part) if may_share else None
        if shared is None:
            return send_copies(source, engines, version=version, bucket_bytes=bucket_bytes, part=part)
        if part == "merged":
            return send_alias(shared, engines, version=version)

        async def send_apart() -> None:
            await send_alias(shared, engines, version=version)
            await send_copies(source, engines, version=version, bucket_bytes=bucket_bytes, part="adapter")

        return send_apart()

    def _plan_for(self, engines: set[object], version: int) -> PublicationPlan:
        if (named := self._plan.named) is not None:
            # Engines that outlive a run may hold an adapter of this version from the run before.
            named = replace(named, name=f"version-{version}-{uuid4().hex[:8]}", retired=self._names)
            self._names = (*self._names, named.name)
            return replace(self._plan, part="adapter", named=named)
        part: WeightPart = "merged" if not self._plan.adapters else "adapter" if engines <= self._based else "apart"
        return replace(self._plan, part=part)


def _start_of(engine: Engine) -> object:
    """Return what tells an engine from another one, and from itself before a restart."""
    return (engine.address.base_url, engine.address.start) if isinstance(engine, AddressedEngine) else id(engine)
