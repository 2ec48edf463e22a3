"""Functions of slime and miles around Megatron's model and optimizer, checkpoints and publications.

--custom-megatron-init-path                     fn(args)                        each rank, at the end of its start
--custom-megatron-before-log-prob-hook-path     fn(args, model, store_prefix)   each rank; model: a list of one chunk
--custom-megatron-before-train-step-hook-path   fn(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)
--custom-megatron-post-save-hook-path           fn(args, rollout_id, checkpoint_dir, hf_checkpoint_dir)    once a checkpoint
--custom-update-weight-post-write-path          fn(args, version_dir, rollout_engines)                     the rank that wrote
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from qwench.config.limits import as_flag
from qwench.config.sections.foreign import ForeignConfig
from qwench.foreign.loading import load
from qwench.foreign.sample import Foreign
from qwench.plugins import Function, check_signature, guarded
from qwench.training.hooks import NO_HOOKS, Hooks
from qwench.training.trainer import Trainer

_CALLED_AS = {
    "custom_megatron_init_path": "fn(args)",
    "custom_megatron_before_log_prob_hook_path": "fn(args, model, store_prefix)",
    "custom_megatron_before_train_step_hook_path": "fn(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)",
    "custom_megatron_post_save_hook_path": "fn(args, rollout_id, checkpoint_dir, hf_checkpoint_dir)",
    "custom_update_weight_post_write_path": "fn(args, version_dir, rollout_engines)",
}
"""Field of the section foreign -> how its function is called."""


@runtime_checkable
class MegatronParts(Protocol):
    """What hooks are given of a trainer (`training.megatron.megatron_trainer`)."""

    @property
    def parts(self) -> tuple[Foreign, Foreign, Foreign]:
        """Return the wrapped model, the optimizer and the schedule of the learning rate."""
        ...


def load_hooks(section: ForeignConfig) -> dict[str, Function]:
    """Load the functions that the flags name, by the field that names them.

    Raises:
        ConfigError: one cannot be loaded, or has another signature.
    """
    loaded = {}
    for name, called_as in _CALLED_AS.items():
        path, flag = getattr(section, name), as_flag(name)
        if path is not None:
            function = load(path, flag=flag)
            check_signature(function, path, flag=flag, called_as=called_as, num_arguments=called_as.count(",") + 1)
            loaded[name] = guarded(function, path=path, flag=flag)
    return loaded


def start_hooks(section: ForeignConfig, trainer: Trainer, args: Callable[[], Namespace]) -> Hooks:
    """Call the function for the start of a rank, and return what is called later on it."""
    loaded = load_hooks(section)
    if not section.megatron_hooks:
        return NO_HOOKS
    assert isinstance(trainer, MegatronParts), "config.rules requires --train-backend megatron"
    if (init := loaded.get("custom_megatron_init_path")) is not None:
        init(args())
    hooks = {}
    if (log_probs := loaded.get("custom_megatron_before_log_prob_hook_path")) is not None:
        hooks["before_log_probs"] = partial(_before_log_probs, log_probs, trainer, args)
    if (step := loaded.get("custom_megatron_before_train_step_hook_path")) is not None:
        hooks["before_step"] = partial(_before_step, step, trainer, args)
    return Hooks(**hooks)


def after_save(section: ForeignConfig, args: Callable[[], Namespace]) -> Callable[[int, Path, Path | None], object] | None:
    """Return what is called with the rollout, the folder of its checkpoint and that of its export. None: nothing."""
    function = load_hooks(section).get("custom_megatron_post_save_hook_path")
    if function is None:
        return None

    def call(rollout_id: int, folder: Path, exported: Path | None) -> None:
        function(args(), rollout_id, str(folder), None if exported is None else str(exported))

    return call


@dataclass(frozen=True, slots=True)
class AfterWrite:
    """Calls the user's function on the rank that wrote the files of a publication; picklable."""

    section: ForeignConfig
    args: Namespace

    def __call__(self, folder: Path, addresses: Sequence[str]) -> None:
        """Call it with the folder and the addresses of the engines that will read it."""
        load_hooks(self.section)["custom_update_weight_post_write_path"](self.args, str(folder), list(addresses))


def _before_log_probs(function: Function, trainer: MegatronParts, args: Callable[[], Namespace], prefix: str) -> None:
    function(args(), [trainer.parts[0]], prefix)


def _before_step(
    function: Function, trainer: MegatronParts, args: Callable[[], Namespace], rollout_id: int, step_id: int
) -> None:
    model, optimizer, schedule = trainer.parts
    function(args(), rollout_id, step_id, [model], optimizer, schedule)
