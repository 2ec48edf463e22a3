"""The checkpoint that a run resumes from: where to find it, what must fit, and what has changed. No model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from qwench.checkpoints.folders import foreign_checkpoint, is_save_folder
from qwench.checkpoints.formats.iterations import Iterations
from qwench.checkpoints.manifest import read_manifest
from qwench.config.limits import as_flag
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.debug import ProfilingConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.samples import Json

_logger = logging.getLogger(__name__)
_WITHOUT_EFFECT = frozenset(
    {"--save", "--load", "--save-hf", "--save-interval", "--keep-checkpoints", "--save-numbering"}
    | {"--ckpt-step", "--log-dir", "--log-level", "--dry-run", "--debug-exit-after-rollout", "--save-trigger-sentinel"}
    | {as_flag(field.name) for section in (TimeoutConfig, ProfilingConfig) for field in fields(section)}
)
"""Flags that name places and reports: another value changes no number."""
_SCHEDULE = (
    "--lr", "--min-lr", "--lr-decay-style", "--lr-decay-iters", "--lr-warmup-iters", "--lr-warmup-fraction",
    "--lr-warmup-init", "--lr-wsd-decay-iters", "--lr-wsd-decay-style", "--weight-decay",
)  # fmt: skip
_HELD = {
    "--n-samples-per-prompt": ("unfinished", "in_flight", "finished"),
    "--rollout-batch-size": ("finished",),
}
"""Flag -> entries of the state of the rollouts that are made of so many responses, or groups."""
_MEANINGS = {
    "--num-rollout": "a decaying learning rate is spread over the new length",
    "--num-epoch": "a decaying learning rate is spread over the new length",
    "--lr": "from the next step on",
    "--global-batch-size": "other steps per rollout; their positions on the x-axis go on from the last one",
    "--rollout-batch-size": "other steps per rollout; their positions on the x-axis go on from the last one",
    "--eval-interval": "--early-stopping-patience counts as if it had been so since the best evaluation",
    "--hf-checkpoint": "its tokenizer and config are used, its weights are not",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A whole checkpoint of a run."""

    folder: Path
    iteration: int
    """Rollouts learned from, and so the id of the next one."""
    meta: Mapping[str, Json]
    rollouts: Mapping[str, Json]
    """State of the rollouts, as their `state_dict` returned it."""
    is_own: bool
    """It lies in --save, not in --load."""

    def train_steps(self, steps_per_rollout: int) -> int:
        """Return the optimizer steps that the run has taken; of older checkpoints, what the run's arithmetic gives."""
        steps = self.meta.get("train_steps")
        return steps if isinstance(steps, int) else self.iteration * steps_per_rollout

    @property
    def ended_by(self) -> str | None:
        """The --stop-metric, or the other flag, that ended the run here."""
        text = self.meta.get("ended_by")
        return text if isinstance(text, str) else None

    def check_length(self, num_rollout: int) -> str | None:
        """Return a notice when the run has done all its rollouts.

        Raises:
            ConfigError: it has done more than --num-rollout.
        """
        if self.iteration > num_rollout:
            raise ConfigError(
                f"--num-rollout {num_rollout} is less than the {self.iteration} rollouts that {self.folder} has done; give a "
                "larger one, or --ckpt-step to go back to an earlier checkpoint."
            )
        if self.iteration == num_rollout:
            return f"{self.folder} is the end of this run (--num-rollout {num_rollout}): nothing to do; a larger one goes on"
        return None

    def check_held(self, flags: Mapping[str, str]) -> None:
        """Check that the groups which the checkpoint holds are of the size that this run trains on.

        Raises:
            ConfigError: their number of responses, or of groups in a rollout, was another one.
        """
        before = self.meta.get("flags")
        saved = before if isinstance(before, Mapping) else {}
        for flag, states in _HELD.items():
            held = sum(len(self.rollouts.get(state, ())) for state in states)
            if held and saved.get(flag) != flags.get(flag):
                raise ConfigError(
                    f"{flag} was {saved.get(flag, '-')} and is {flags.get(flag, '-')}, but {self.folder} holds what was "
                    f"generated and not yet trained on ({held} groups or rollouts); go on with {flag} {saved.get(flag, '-')}."
                )

    def check_schedule(self, flags: Mapping[str, str]) -> None:
        """Check that learning rates and weight decay are those of the run that saved this.

        Raises:
            ConfigError: another flag was given than then.
        """
        before = self.meta.get("flags")
        saved = before if isinstance(before, Mapping) else {}
        differing = [flag for flag in _SCHEDULE if saved.get(flag) != flags.get(flag)]
        if differing:
            then = ", ".join(f"{flag} {saved.get(flag, '-')}" for flag in differing)
            raise ConfigError(
                f"--use-checkpoint-opt-param-scheduler: {self.folder} was saved with {then}; give the same, "
                "or leave the flag out"
            )

    def changes(self, flags: Mapping[str, str]) -> list[str]:
        """Return one line for each flag whose value is another than that of the run that saved this."""
        before = self.meta.get("flags")
        if not isinstance(before, Mapping):
            return []
        lines = []
        for flag in sorted({*before, *flags} - _WITHOUT_EFFECT):
            old, new = before.get(flag, "-"), flags.get(flag, "-")
            if old != new:
                meaning = f" ({_MEANINGS[flag]})" if flag in _MEANINGS else ""
                lines.append(f"changed since checkpoint {self.iteration}: {flag} {old} -> {new}{meaning}")
        return lines


def sources(config: CheckpointConfig, own: Iterations | None) -> list[Iterations]:
    """Return where to look for what runs saved: the own folder first, because the same command may have run before."""
    first = [own] if own is not None else []
    if foreign_checkpoint(config) is not None:
        return first
    if config.ckpt_step is not None and not config.finetune:
        assert config.load is not None, "--ckpt-step needs --load"
        return [Iterations(config.load)]
    if config.finetune or config.load is None or is_save_folder(config, config.load):
        return first
    return [*first, Iterations(config.load)]


def newest_whole(source: Iterations, *, step: int | None) -> tuple[int, Mapping[str, Json]] | None:
    """Return the number of the newest checkpoint that is as it was written, and its meta.json; None: there is none.

    Args:
        step: the number of the only one that is looked at.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    candidates = source.newest_first() if step is None else [step]
    for number in candidates:
        try:
            return number, read_manifest(source.folder(number))
        except CheckpointError as error:
            _logger.warning("checkpoint %d is damaged and passed over: %s", number, error)
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {source.root} is whole (damaged: {', '.join(map(str, candidates))}); restore the files "
            "from a copy, or start anew with another --save and without --load."
        )
    return None
