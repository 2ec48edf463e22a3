"""`qwench sft`: supervised fine-tuning, the same loop over conversations and without engines."""

from __future__ import annotations

from collections.abc import Sequence

from qwench.commands import train
from qwench.config.command_line.parse import parse_sft


def run(words: Sequence[str]) -> None:
    """Train on conversations."""
    train.run(words, parse=parse_sft)
