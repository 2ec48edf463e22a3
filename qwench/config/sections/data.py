"""The training data: files, columns, and the rendering of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwench.config.limits import check_import_path, check_positive
from qwench.errors import ConfigError

_NOT_OF_A_TEMPLATE: Mapping[str, str] = {
    "chat_template": "--chat-template-path names another template",
    "tools": "--tool-key names their column",
    **dict.fromkeys(("conversation", "messages"), "--input-key names their column"),
    **dict.fromkeys(("add_generation_prompt", "continue_final_message"), "the verb decides how the text ends"),
    **dict.fromkeys(
        (
            "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
            "return_assistant_tokens_mask", "tokenizer_kwargs",
        ),
        "the rendered text is tokenized as it is",
    ),
}  # fmt: skip
"""Arguments of the call that renders a conversation, which no template reads -> what sets them instead."""

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
    chat_template_path: Path | None = None
    """File with a Jinja chat template, which takes the place of the tokenizer's everywhere in the run, and in the exports of
    --save-hf. None: the tokenizer's own."""
    rollout_shuffle: bool = False
    """Shuffle the prompts in every epoch."""
    rollout_seed: int = 42
    """Seed of the shuffle (plus the epoch) and of seeded sampling (plus the sample's index in its group)."""
    curriculum_band: tuple[float, ...] = ()
    """Draw only prompts whose pass rate lies between two numbers from 0 to 1, for example 0.1 0.9. The rate is measured when a
    prompt is drawn; until then the prompt is in the band. None: draw all prompts."""
    curriculum_key: str | None = None
    """Column of the pass rate of each prompt before it is measured. None: it is not known before."""
    curriculum_pass_reward: float = 1.0
    """Lowest reward of a response that passes, for --curriculum-band."""
    curriculum_retry_epochs: int = 3
    """Draw a prompt outside of --curriculum-band again after it was left out in this many epochs: the policy has changed."""
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
        for name in self.apply_chat_template_kwargs.keys() & _NOT_OF_A_TEMPLATE.keys():
            raise ConfigError(
                f"--apply-chat-template-kwargs has {name}, which is no variable of a template: {_NOT_OF_A_TEMPLATE[name]}; "
                "leave it out"
            )
        self._check_curriculum()

    def _check_curriculum(self) -> None:
        check_positive("--curriculum-retry-epochs", self.curriculum_retry_epochs)
        band = self.curriculum_band
        if band and not (len(band) == 2 and 0 <= band[0] <= band[1] <= 1):
            raise ConfigError(
                f"--curriculum-band must be two numbers from 0 to 1, the lower first, got {' '.join(f'{x:g}' for x in band)}"
            )
        for flag, is_given in (
            ("--curriculum-key", self.curriculum_key is not None),
            ("--curriculum-pass-reward", self.curriculum_pass_reward != 1.0),
            ("--curriculum-retry-epochs", self.curriculum_retry_epochs != 3),
        ):
            if is_given and not band:
                raise ConfigError(f"{flag} has no effect without --curriculum-band LOW HIGH; add it, or leave it out")
