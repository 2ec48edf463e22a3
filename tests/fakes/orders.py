"""Orders of engine servers for tests."""

from pathlib import Path

from qwench.config.sections.engine import EngineConfig
from qwench.engines.kinds.kind import ServerOrder


def server_order(model_folder: Path, log_folder: Path, *, token: str = "secret", **changes) -> ServerOrder:
    """Return an order with small values; a change is a field of `ServerOrder`, or else a flag of the engine section."""
    flags = {name: changes.pop(name) for name in list(changes) if name not in ServerOrder.__slots__}
    fields = {
        "engine": EngineConfig(**flags), "model_folder": model_folder, "dtype": "float32", "engine_sizes": (1,) * 8,
        "releases_memory": False, "seed": 42, "serves_checkpoint": False, "log_folder": log_folder,
        "deterministic": False, "token": token,
    }  # fmt: skip
    return ServerOrder(**(fields | changes))
