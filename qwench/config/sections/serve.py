"""Settings of `qwench serve`: the embedded engine behind SGLang's HTTP API."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwench.config.limits import check_positive
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.model import ModelConfig
from qwench.errors import ConfigError

MAX_PORT = 65_535


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Where the server listens."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: this machine only. 0.0.0.0: all machines."""
    port: int = 30000
    """Port to listen on."""

    def __post_init__(self) -> None:
        check_positive("--port", self.port)
        if self.port > MAX_PORT:
            raise ConfigError(f"--port must be at most {MAX_PORT}, got {self.port}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Everything a server needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
