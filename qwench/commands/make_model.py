"""`qwench make-model`: a checkpoint with random weights."""

from __future__ import annotations

from collections.abc import Sequence

from qwench.config.command_line.parse import parse_flags
from qwench.config.sections.verbs import MakeModelConfig
from qwench.models.made.qwen3 import make_checkpoint
from qwench.models.made.tokenizers import build_qwen_tokenizer, build_small_tokenizer


def run(words: Sequence[str]) -> None:
    """Write the checkpoint."""
    config = parse_flags(MakeModelConfig, words, prog="qwench make-model")
    tokenizer = build_qwen_tokenizer(config.qwen_tiktoken) if config.tokenizer == "qwen" else build_small_tokenizer()
    make_checkpoint(config.output, size=config.size, tokenizer=tokenizer, seed=config.seed)
