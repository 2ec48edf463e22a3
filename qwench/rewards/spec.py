"""Which reward a run uses; checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qwench.errors import ConfigError, RewardError
from qwench.rewards.graders import check_label, find_grader, is_remote, needs_label
from qwench.samples import Json, Prompt, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSpec:
    """The choice of a reward; plain values, so it can be sent to other processes."""

    rm_type: str | None = None
    """`--rm-type`; a sample's `metadata.rm_type` wins over it."""
    custom_path: str | None = None
    """`--custom-rm-path package.module.function`; wins over every rm_type."""
    url: str | None = None
    """`--rm-url`: of the server that `remote_rm` asks."""
    key: str | None = None
    """`--reward-key`: the value of the reward's record that is the score."""

    def __post_init__(self) -> None:
        if self.rm_type is not None:
            find_grader(self.rm_type)

    def type_for(self, metadata: Mapping[str, Json]) -> str:
        """Return the rm_type of a row with this metadata.

        Raises:
            ConfigError: neither the row nor the run names one.
        """
        chosen = str(metadata.get("rm_type") or self.rm_type or "").strip()
        if not chosen:
            raise ConfigError("no reward is chosen: pass --rm-type or --custom-rm-path, or give every row a metadata.rm_type.")
        return chosen

    def type_of(self, sample: Sample) -> str:
        """Return the rm_type of one sample."""
        return self.type_for(sample.metadata if "rm_type" in sample.metadata else sample.prompt.metadata)

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Check that every prompt can be graded.

        Raises:
            ConfigError: a prompt names an unknown reward, or lacks the label its reward needs.
        """
        if self.custom_path is not None:
            return
        for row, prompt in enumerate(prompts):
            rm_type = self.type_for(prompt.metadata)
            find_grader(rm_type)
            if is_remote(rm_type) and self.url is None:
                raise ConfigError(f"row {row} of the prompts is graded by {rm_type}; give the server's address by --rm-url.")
            if needs_label(rm_type) and prompt.label is None:
                raise ConfigError(f"row {row} of the prompts has no label, which --rm-type {rm_type} needs; pass --label-key.")
            try:
                check_label(rm_type, prompt)
            except RewardError as error:
                raise ConfigError(f"row {row} of the prompts: {error}") from error
