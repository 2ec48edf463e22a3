"""How to start the embedded engine as a server of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwench.engines.fleet.servers import ServerCommand, server_environ, visible_devices

TOKEN_VARIABLE = "QWENCH_TOKEN"


def embedded_command(
    words: Sequence[str],
    *,
    index: int,
    gpu_ids: Sequence[int],
    environ: Mapping[str, str],
    log_folder: Path,
    token: str,
    start_timeout_s: float,
    host: str = "127.0.0.1",
) -> ServerCommand:
    """Return how to start engine `index` with the flags `words` of `qwench serve`; see `sglang_command` for the rest."""
    return ServerCommand(
        label=f"engine server {index}",
        argv=(sys.executable, "-m", "qwench", "serve", *words),
        environ=server_environ(environ, **{TOKEN_VARIABLE: token}, **visible_devices(gpu_ids, environ)),
        log_file=log_folder / f"engine-{index}.log",
        host=host,
        start_timeout_s=start_timeout_s,
    )
