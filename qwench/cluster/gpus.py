"""Who holds device memory, and when; nothing else in the package decides it.

    colocated:   engines generate -> [engines give up memory, learner takes it: learn, save, publish] -> engines generate
    dedicated:   engines and learner each keep what they have (also a CPU, where memory is not scarce)

`weights_may_alias`: no engine samples between an optimizer step and the publication after it, so that it may compute with the
learner's own tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from qwench.engines.fleet.pool import EnginePool
from qwench.engines.protocol import AddressedEngine, MemoryTag
from qwench.errors import EngineError
from qwench.observability.timing import PhaseTimer
from qwench.weights.publisher import PublishedModel

_logger = logging.getLogger(__name__)


class DedicatedGpus:
    """Learner and engines share no device memory worth moving."""

    def __init__(self, *, weights_may_alias: bool) -> None:
        self.weights_may_alias = weights_may_alias

    def make_room(self) -> None:
        """Do nothing."""

    @contextmanager
    def held_by(self, model: PublishedModel) -> Iterator[None]:
        """Do nothing around the block."""
        yield

    def keep_for(self, model: PublishedModel) -> None:
        """Do nothing."""


class ColocatedGpus:
    """Learner and engines take turns on the same device.

    The engines' KV cache, much the largest part, goes while the learner works (`offload_rollout`); the learner's masters and
    optimizer state go while the engines work (`offload_train`). Torch caches what the learner frees. An engine of this process
    that wakes takes what it lacks from that cache. For all others the learner gives it back.
    """

    def __init__(
        self, engines: EnginePool, timer: PhaseTimer, *, offload_rollout: bool, offload_train: bool, weights_may_alias: bool
    ) -> None:
        self.weights_may_alias = weights_may_alias
        self._engines = engines
        self._timer = timer
        self._engine_tags = [MemoryTag.KV_CACHE] if offload_rollout else []
        self._offload_train = offload_train
        self._has_room = not offload_rollout

    def make_room(self) -> None:
        """Have the engines give up memory, also before the learner is built: it may need more than they leave."""
        if not self._has_room:
            self._engines.sleep(self._engine_tags)
            self._has_room = True

    @contextmanager
    def held_by(self, model: PublishedModel) -> Iterator[None]:
        """Give the device to the learner inside the block, to the engines after it."""
        with self._timer.phase("offload"):
            self.make_room()
            model.wake()
        yield
        with self._timer.phase("offload"):
            if self._offload_train:
                model.sleep()
            if not self._engine_tags or any(isinstance(engine, AddressedEngine) for engine in self._engines.engines):
                model.release_cache()
            if self._engine_tags:
                self._engines.wake(self._engine_tags)
                self._has_room = False

    def keep_for(self, model: PublishedModel) -> None:
        """Give the device to the learner for the rest of the run; engines may have ended already."""
        try:
            self.make_room()
        except EngineError as error:
            _logger.warning("the engines keep their memory: %s", error)
        model.wake()
