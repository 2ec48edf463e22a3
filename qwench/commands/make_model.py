"""`qwench make-model`: a checkpoint with random weights."""

from __future__ import annotations

from collections.abc import Sequence

from qwench.config.command_line.parse import parse_flags
from qwench.config.sections.verbs import MakeModelConfig
from qwench.files import written
from qwench.observability.console import open_console


def run(words: Sequence[str]) -> None:
    """Write the checkpoint."""
    config = parse_flags(MakeModelConfig, words, prog="qwench make-model")
    from qwench.models.built_tokenizers import build_qwen_tokenizer, build_small_tokenizer  # transformers: help does not wait
    from qwench.models.random_qwen3 import make_checkpoint

    tokenizer = build_qwen_tokenizer(config.qwen_tiktoken) if config.tokenizer == "qwen" else build_small_tokenizer()
    with written(f"--output {config.output}", config.output):
        made = make_checkpoint(config.output, size=config.size, tokenizer=tokenizer, seed=config.seed)
    open_console().say(
        f"{config.output}: {made.model_type} with random weights (--seed {config.seed}), {made.num_hidden_layers} layers of "
        f"{made.hidden_size}, {len(tokenizer)} tokens, {made.dtype}"
    )
