"""`qwench serve`: the embedded engine behind SGLang's HTTP API."""

from __future__ import annotations

from collections.abc import Sequence

from qwench.config.command_line.parse import parse_serve


def run(words: Sequence[str]) -> None:
    """Serve the checkpoint until the process is ended."""
    config = parse_serve(words)
    from qwench.launch.evaluation import serve  # PyTorch: a mistake in the flags is told before it is imported

    serve(config)
