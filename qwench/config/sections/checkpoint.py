"""Checkpoints: their folders, the start of a run, and how many are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwench.config.limits import check_not_negative, check_path_template, check_positive
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Folders and intervals of checkpoints."""

    load: Path | None = None
    """Folder of checkpoints to resume from. If it holds none, the run starts fresh from --ref-load, or from --hf-checkpoint if
    the folder is also --save. An iter_N of slime or miles goes on with rollout N + 1; other checkpoints of Hugging Face and
    Megatron give the weights of rollout 0."""
    save: Path | None = None
    """Folder to write checkpoints to. None: nothing is saved."""
    save_numbering: Literal["learned", "last"] = "learned"
    """Number of a folder iter_N in --save. learned: the rollouts learned from. last: the id of the last of them, which counts
    from 0, as slime and miles name their folders."""
    save_interval: int | None = None
    """Save a checkpoint every this many rollouts, and after the last. None: after the last rollout only."""
    save_trigger_sentinel: Path | None = None
    """A file that asks for a checkpoint after the current rollout, beside SAVE_NOW in the folder of --save. The run removes it
    when it has saved. None: SAVE_NOW alone."""
    save_hf: str | None = None
    """Folder for a Hugging Face checkpoint, written with every save. {rollout_id} in the name is replaced."""
    keep_checkpoints: int | None = None
    """Number of newest checkpoints to keep; older ones are deleted after a verified save. None: keep all."""
    keep_best: bool = False
    """Keep also the checkpoint with the best result on the first evaluation set (the highest score; qwench sft: the lowest
    loss). It is written when an evaluation is the best so far."""
    early_stopping_patience: int | None = None
    """End the run, with its checkpoint saved, when this many evaluations in a row were not better than the best one. Needs
    --keep-best and --eval-interval. None: only --stop-metric ends a run before its last rollout."""
    save_retain_interval: int | None = None
    """Keep only older checkpoints after a multiple of this many rollouts. A multiple of --save-interval. None: keep all."""
    exit_on_missing_checkpoint: bool = False
    """End with an error when --load holds no checkpoint. Off: a --load that is also --save may be empty."""
    ref_load: Path | None = None
    """Weights of the reference, and of the policy of a fresh run: a checkpoint of Hugging Face, torch_dist or FSDP, or its
    parent folder. None: --hf-checkpoint."""
    ref_ckpt_step: int | None = None
    """Iteration to read from --ref-load. None: the latest."""
    ckpt_step: int | None = None
    """Iteration to read from --load. None: the latest."""
    no_load_optim: bool = False
    """Do not load the optimizer state; start with a fresh optimizer."""
    use_checkpoint_opt_param_scheduler: bool = False
    """Refuse to resume with another learning rate, schedule or weight decay than the checkpoint's. Off: the flags decide, and
    the start says what has changed."""
    no_load_rng: bool = False
    """Do not load the states of the random number generators."""
    finetune: bool = False
    """Take the weights of --load alone: optimizer, random numbers and data begin anew, with rollout 0."""
    start_rollout_id: int | None = None
    """Number of the first rollout of a start from other weights than those of a run here. None: 0, or what --load says."""
    no_save_optim: bool = False
    """Do not save the optimizer state. Such a checkpoint cannot be resumed exactly."""
    no_save_rng: bool = False
    """Do not save the states of the random number generators. Such a checkpoint resumes with --no-load-rng."""

    def __post_init__(self) -> None:
        check_path_template("--save-hf", self.save_hf)
        check_positive("--save-interval", self.save_interval)
        check_positive("--keep-checkpoints", self.keep_checkpoints)
        check_positive("--save-retain-interval", self.save_retain_interval)
        check_positive("--early-stopping-patience", self.early_stopping_patience)
        check_not_negative("--ckpt-step", self.ckpt_step)
        check_not_negative("--ref-ckpt-step", self.ref_ckpt_step)
        check_not_negative("--start-rollout-id", self.start_rollout_id)
        for flag, value in (
            ("--save-interval", self.save_interval),
            ("--keep-checkpoints", self.keep_checkpoints),
            ("--save-retain-interval", self.save_retain_interval),
            ("--save-hf", self.save_hf),
            ("--save-trigger-sentinel", self.save_trigger_sentinel),
            ("--keep-best", self.keep_best or None),
            ("--save-numbering", None if self.save_numbering == "learned" else self.save_numbering),
        ):
            if value is not None and self.save is None:
                given = flag if value is True else f"{flag} ({value})"
                raise ConfigError(f"{given} has no effect without a folder to save to; give --save")
        if self.keep_best and self.save_numbering == "last":
            raise ConfigError("--keep-best may keep the weights before rollout 0, which --save-numbering last cannot number")
        if self.early_stopping_patience is not None and not self.keep_best:
            raise ConfigError(
                f"--early-stopping-patience ({self.early_stopping_patience}) counts the evaluations after the best one; give "
                "--keep-best"
            )
        if self.save_retain_interval is not None and self.save_retain_interval % (self.save_interval or 1):
            raise ConfigError(
                f"--save-retain-interval ({self.save_retain_interval}) must be a multiple of --save-interval "
                f"({self.save_interval})"
            )
        if self.ckpt_step is not None and self.load is None:
            raise ConfigError(f"--ckpt-step ({self.ckpt_step}) picks a checkpoint of --load; give --load")
        if self.ref_ckpt_step is not None and self.ref_load is None:
            raise ConfigError(f"--ref-ckpt-step ({self.ref_ckpt_step}) picks a checkpoint of --ref-load; give --ref-load")

    @property
    def early_stopping(self) -> str | None:
        """Return --early-stopping-patience as it is given, if it is."""
        return None if self.early_stopping_patience is None else f"--early-stopping-patience {self.early_stopping_patience}"

    def number(self, learned: int) -> int:
        """Return the number of the checkpoint after `learned` rollouts."""
        return learned - 1 if self.save_numbering == "last" else learned
