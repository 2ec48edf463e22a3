"""A verb of the command line in this process, whose errors are raised."""

from __future__ import annotations

from collections.abc import Sequence

from qwench.cli import find_command


def run_verb(words: Sequence[str]) -> None:
    """Run `qwench WORDS`."""
    command, rest = find_command(words)
    command(rest)
