"""What a launch script says in the words of slime or miles."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from qwench.config.limits import as_flag, check_import_path


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignConfig:
    """Functions written for slime or miles, and flags that mean something only there."""

    plugin_api: Literal["auto", "qwench", "slime", "miles"] = "auto"
    """Calling convention of custom functions. auto: told by each function's parameters and imports."""
    custom_config_path: Path | None = None
    """YAML file of settings. A key that names a flag sets it; the others become attributes of the args of custom functions."""
    custom_advantage_function_path: str | None = None
    """Function fn(args, rollout_data) that sets the advantages of a rollout, in slime's form. None: those of the method."""
    rollout_data_postprocess_path: str | None = None
    """Function that sees and changes the scored data of a rollout, in slime's form fn(args, rollout_id, rollout_data)."""
    custom_convert_samples_to_train_data_path: str | None = None
    """Function fn(args, samples) that returns a rollout's training data as a dict of lists, normalised rewards included."""
    custom_update_weight_post_write_path: str | None = None
    """Function fn(args, version_dir, rollout_engines) between the files of a publication by disk and their reading. The
    process that wrote the files calls it."""
    custom_megatron_init_path: str | None = None
    """Function fn(args) that every rank of the Megatron backend calls at the end of its start."""
    custom_megatron_before_log_prob_hook_path: str | None = None
    """Function fn(args, model, store_prefix) that Megatron ranks call before a pass without gradient."""
    custom_megatron_before_train_step_hook_path: str | None = None
    """Function fn(args, rollout_id, step_id, model, optimizer, opt_param_scheduler) before an optimizer step of Megatron."""
    custom_megatron_post_save_hook_path: str | None = None
    """Function fn(args, rollout_id, checkpoint_dir, hf_checkpoint_dir) that is called once after each checkpoint."""
    declared_args: tuple[str, ...] = ()
    """Flags, with their values, that a rollout or generate function declares by its add_arguments(parser)."""
    unused_flags: tuple[str, ...] = ()
    """Given flags that have an effect in slime, miles or Megatron and none here, as the warning names them."""
    overridden_flags: tuple[str, ...] = ()
    """Flags of the command line, with values that a later one of the same name replaced."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name.endswith("_path") and item.name != "custom_config_path":
                check_import_path(as_flag(item.name), getattr(self, item.name))

    @property
    def megatron_hooks(self) -> tuple[str, ...]:
        """Return the flags that name functions around Megatron's model."""
        hooks = (item.name for item in fields(self) if item.name.startswith("custom_megatron_"))
        return tuple(as_flag(name) for name in hooks if getattr(self, name) is not None)
