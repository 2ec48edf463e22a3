"""Where prompts come from and how a row becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwench.config.limits import check_positive

LossMaskType = Literal["qwen", "qwen3", "qwen3_5", "distill_qwen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The training data set."""

    prompt_data: str | None = None
    """A .jsonl or .parquet file, one row a prompt; `path@[a:b]` takes rows a to b, negative numbers count from the end."""
    input_key: str = "input"
    """Column with the prompt: a text, or a list of messages (qwench sft: messages)."""
    label_key: str | None = None
    """Column with the answer that the reward compares with. None: rows have no label."""
    metadata_key: str = "metadata"
    """Column with a record that rewards and custom functions get to see."""
    tool_key: str = "tools"
    """Column with the tools that the chat template renders."""
    apply_chat_template: bool = False
    """Render the prompt with the tokenizer's chat template."""
    apply_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template as JSON, for instance '{"enable_thinking": false}'."""
    rollout_shuffle: bool = False
    """Shuffle the prompts anew in every epoch."""
    rollout_seed: int = 42
    """Seed of the shuffle (plus the epoch) and of seeded sampling (plus the index in the group)."""
    rollout_max_prompt_len: int | None = None
    """Prompts of more tokens are dropped when the data is loaded, and counted. None: no limit."""
    loss_mask_type: LossMaskType | None = None
    """How assistant tokens are found in a rendered conversation (SFT). None: derived from the chat template."""

    def __post_init__(self) -> None:
        check_positive("--rollout-max-prompt-len", self.rollout_max_prompt_len)
