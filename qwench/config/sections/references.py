"""What a launch script says in the words of slime or miles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_import_path


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferencesConfig:
    """Functions written for slime or miles, and flags that mean something only there."""

    plugin_api: Literal["auto", "qwench", "slime", "miles"] = "auto"
    """Calling convention of custom functions. auto: told by each function's parameters and imports."""
    custom_config_path: Path | None = None
    """YAML file of settings. A key that names a flag sets it; the others become attributes of the args of custom functions."""
    custom_advantage_function_path: str | None = None
    """Function fn(args, rollout_data) that sets the advantages of a rollout, in slime's form. None: those of the method."""
    rollout_data_postprocess_path: str | None = None
    """Function that sees and changes the scored data of a rollout, in slime's form fn(args, rollout_id, rollout_data)."""
    unused_flags: tuple[str, ...] = ()
    """Names of given flags that have an effect in slime, miles or Megatron and none here."""

    def __post_init__(self) -> None:
        check_import_path("--custom-advantage-function-path", self.custom_advantage_function_path)
        check_import_path("--rollout-data-postprocess-path", self.rollout_data_postprocess_path)
