"""What differs between kinds of engine. Nothing outside `engines.kinds` asks for a kind's name.

A new kind is one file that makes an `EngineKind`, one entry of `engines.kinds.KINDS`, and its facts in `ENGINE_FACTS`
(`config.sections.engine`), which checks and plan read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qwench.config.sections.engine import EngineConfig
from qwench.engines.fleet.servers import ServerCommand
from qwench.engines.kinds.receiver import Receiver
from qwench.models.peft import AdapterConfig
from qwench.wire.addresses import EngineAddress


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOrder:
    """What all servers of a run share; picklable."""

    engine: EngineConfig
    model_folder: Path
    """Absolute: a server may start in another folder."""
    dtype: str
    """`bfloat16` or `float32`: that of the published weights."""
    engine_sizes: tuple[int, ...]
    """Devices of each engine."""
    releases_memory: bool
    """The engines give memory back while the trainer works."""
    seed: int
    serves_checkpoint: bool
    """The engines sample with the weights in `model_folder` as version 0; else only after the first publication."""
    log_folder: Path
    deterministic: bool
    """A response has the same bits in every run, also beside other requests (--deterministic-mode)."""
    ranks_requests: bool = False
    """Some requests wait for all others (--eval-low-priority)."""
    keeps_requests: bool = False
    """Publications change the weights while requests wait or run (--fully-async)."""
    stretched_positions: int | None = None
    """Tokens of the longest text where the rotary scaling allows more than max_position_embeddings says; None: it does not."""
    adapter: AdapterConfig | None = None
    """Of the adapters that publications bring by name; None: there are none."""
    token: str = field(repr=False)
    """Clients show it to change weights or memory."""


class MakeCommand(Protocol):
    """Makes one server's command where the server will run; picklable."""

    def __call__(
        self, order: ServerOrder, *, index: int, gpu_ids: Sequence[int], environ: Mapping[str, str], host: str
    ) -> ServerCommand:
        """Return how to start engine `index`.

        Args:
            gpu_ids: the engine's GPUs, counted among those that `environ` shows; empty: all of them, or a CPU.
            environ: of the process that starts the server.
            host: address that the server listens on and is reached at.
        """
        ...


class Connect(Protocol):
    """Makes a receiver of weights."""

    def __call__(self, address: EngineAddress, *, timeout_s: float) -> Receiver:
        """Return the receiver for a server, which is not asked anything yet."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKind:
    """One kind of engine."""

    name: str
    """As --rollout-engine and `EngineAddress.kind` spell it."""
    check_flags: Callable[[EngineConfig], None]
    """Raises a ConfigError if the kind is not installed, or does not take the flags that pass through to it."""
    command: MakeCommand
    receiver: Connect
    answers: Callable[[Mapping[str, Any]], bool]  # the server's JSON
    """Tells whether a server's `/model_info` is that of this kind."""
