"""What a launch script says in the words of slime or miles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferencesConfig:
    """Functions written for slime or miles, and flags that mean something only there."""

    plugin_api: Literal["auto", "qwench", "slime", "miles"] = "auto"
    """Calling convention of custom functions. auto: told by each function's parameters and imports."""
    custom_config_path: Path | None = None
    """YAML file of settings. A key that names a flag sets it; the others become attributes of the args of custom functions."""
    unused_flags: tuple[str, ...] = ()
    """Names of given flags that have an effect in slime, miles or Megatron and none here."""
