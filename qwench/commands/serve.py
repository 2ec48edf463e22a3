"""`qwench serve`: the embedded engine behind the HTTP APIs of SGLang and OpenAI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qwench.config.command_line.parse import parse_serve
from qwench.hub import model_folder
from qwench.observability.processes import dump_stacks_on_signal


def run(words: Sequence[str]) -> None:
    """Serve the checkpoint until the process is ended."""
    dump_stacks_on_signal()
    config = parse_serve(words)
    assert config.model.hf_checkpoint is not None, "config.verb_checks requires --hf-checkpoint"
    folder = model_folder(config.model.hf_checkpoint, flag="--hf-checkpoint")
    config = replace(config, model=replace(config.model, hf_checkpoint=folder))
    from qwench.launch.engines import serve  # PyTorch: a mistake in the flags is told before it is imported

    serve(config)
