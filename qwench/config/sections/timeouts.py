"""How long each part of a run may take. When a deadline passes, the stacks of all processes are in stacks.txt of --log-dir."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qwench.config.limits import as_flag, check_seconds
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeoutConfig:
    """Deadlines; a wait longer than 30 s is reported before."""

    rollout_timeout: float | None = None
    """Seconds to generate and grade one rollout. None: no limit."""
    eval_timeout: float | None = None
    """Seconds to answer and grade one evaluation set. None: no limit."""
    generate_timeout: float = 3600.0
    """Seconds in which an engine server, a teacher, or a server that functions of slime or miles ask answers one request."""
    train_timeout: float = 43_200.0
    """Seconds to learn from one rollout, with several trainer ranks."""
    distributed_timeout_minutes: float = 30.0
    """Minutes that a trainer rank waits for the others in one collective."""
    update_weights_timeout: float = 600.0
    """Seconds in which an engine server must take one bucket of published weights. A publication may take twice as long."""
    checkpoint_timeout: float = 3600.0
    """Seconds to save or load a checkpoint, with several trainer ranks."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_seconds(as_flag(field.name), getattr(self, field.name))
        if not 1 <= self.distributed_timeout_minutes * 60 <= 1e8:
            raise ConfigError(
                f"--distributed-timeout-minutes must be from 1 second to 3 years, got {self.distributed_timeout_minutes}"
            )
