"""The training data: files, columns, and the rendering of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwench.config.limits import check_import_path, check_positive

LossMaskType = Literal["qwen", "qwen3", "distill_qwen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The training data set."""

    prompt_data: str | None = None
    """Training data, one row a prompt: a file (.jsonl, .json, .csv, .parquet), a folder or a pattern of files, or OWNER/NAME of
    the Hugging Face hub. path@[a:b] takes rows a to b; negative numbers count from the end."""
    disable_rollout_global_dataset: bool = False
    """Read no --prompt-data: the rollout function or the data source brings its own prompts."""
    data_source_path: str | None = None
    """Class that hands out the prompts in place of --prompt-data, in slime's form: cls(args) with get_samples(n),
    add_samples(groups), save(rollout_id), load(rollout_id) and __len__()."""
    input_key: str = "input"
    """Column of the prompt: a text or a list of messages (qwench sft: messages)."""
    label_key: str | None = None
    """Column of the answer that the reward compares with. None: no label."""
    metadata_key: str = "metadata"
    """Column of a record that is passed to rewards and custom functions."""
    tool_key: str = "tools"
    """Column of the tools that the chat template renders."""
    apply_chat_template: bool = False
    """Render prompts with the tokenizer's chat template."""
    apply_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Extra arguments of the chat template, as JSON, for example '{"enable_thinking": false}'."""
    rollout_shuffle: bool = False
    """Shuffle the prompts in every epoch."""
    rollout_seed: int = 42
    """Seed of the shuffle (plus the epoch) and of seeded sampling (plus the sample's index in its group)."""
    rollout_max_prompt_len: int | None = None
    """Longest prompt in tokens; longer ones are dropped and counted when the data is loaded. None: no limit."""
    loss_mask_type: LossMaskType | None = None
    """How SFT finds assistant tokens in a rendered conversation. None: derived from the chat template."""

    @property
    def brings_prompts(self) -> bool:
        """Tell whether a function or a data source of the user brings the prompts."""
        return self.disable_rollout_global_dataset or self.data_source_path is not None

    def __post_init__(self) -> None:
        check_import_path("--data-source-path", self.data_source_path)
        check_positive("--rollout-max-prompt-len", self.rollout_max_prompt_len)
