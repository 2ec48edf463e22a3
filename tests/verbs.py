"""A verb of the command line in this process, whose errors are raised."""

from __future__ import annotations

from collections.abc import Sequence

from qwench.cli import find_command
from tests.fakes import cuda_stand_in


def run_verb(words: Sequence[str]) -> None:
    """Run `qwench WORDS`."""
    command, rest = find_command(words)
    command(rest)


def run_verb_without_cuda(words: Sequence[str]) -> None:
    """Run `qwench WORDS` in a forked process where the CPU answers for CUDA, as Megatron-Core needs it."""
    cuda_stand_in.install()
    run_verb(words)
