"""The start of a run that has no checkpoint of a run here: other weights, or a run of slime or miles that goes on.

    FOLDER/iter_0000007                                   learned from rollouts 0 to 7, so 8 is the next
    FOLDER/rollout/global_dataset_state_dict_7.pt         epoch, row, and ids of groups and samples

Its order of rows is ours: `random.Random(seed + epoch).shuffle`. A checkpoint named `release` is a converted model, no run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwench.checkpoints.folders import foreign_checkpoint
from qwench.checkpoints.formats.dcp_reader import DcpFolder, load_data
from qwench.checkpoints.formats.iterations import Iterations, number_of
from qwench.checkpoints.formats.sources import find_checkpoint, find_format
from qwench.checkpoints.formats.torch_dist import read_num_steps
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.samples import Json
from qwench.wire.portions import WeightBucket

_logger = logging.getLogger(__name__)
_CURSOR = {"epoch_id": "epoch", "sample_offset": "offset", "sample_group_index": "group_index", "sample_index": "sample_index"}
"""Entry of theirs -> of a `DataCursor`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignRun:
    """Progress of the run that wrote `folder`."""

    folder: Path
    next_rollout_id: int
    num_steps: int | None
    """Optimizer steps done; None: the optimizer is not taken over."""
    cursor: Mapping[str, int] | None
    """Position in the data; None: it is not known."""

    @property
    def rollouts(self) -> Mapping[str, Json] | None:
        """Return the state of rollouts, as a stream of any kind loads it."""
        return None if self.cursor is None else {**self.cursor, "source": dict(self.cursor), "unfinished": []}

    def notices(self) -> Sequence[str]:
        """Return what is taken over, and what is not."""
        taken = ["weights"] + ["optimizer"] * (self.num_steps is not None) + ["data position"] * (self.cursor is not None)
        lines = [f"{self.folder} is of slime or miles: going on with rollout {self.next_rollout_id} and its {', '.join(taken)}"]
        if self.num_steps is None:
            lines.append("its optimizer is not taken over: moments and learning-rate schedule begin anew")
        if self.cursor is None:
            lines.append("its data position is not known: data begins with the first row of epoch 0")
        lines.append("its random numbers are not taken over, nor groups that were unfinished; the flags set the learning rate")
        return lines


def read_foreign_run(config: CheckpointConfig) -> ForeignRun | None:
    """Return the run whose checkpoint --load holds; None: it holds our run's, only weights, or nothing.

    Raises:
        ConfigError: its optimizer depends on the layout that it was saved from, or its data position cannot be read.
    """
    folder = foreign_checkpoint(config)
    rollout_id = None if folder is None else number_of(folder)
    if folder is None or rollout_id is None or config.finetune:
        return None
    try:
        steps = read_num_steps(DcpFolder(folder)) if find_format(folder) == "torch_dist" and not config.no_load_optim else None
    except CheckpointError as error:
        raise ConfigError(f"--load: {error}") from error
    return ForeignRun(
        folder=folder,
        next_rollout_id=rollout_id + 1 if config.start_rollout_id is None else config.start_rollout_id,
        num_steps=steps,
        cursor=_read_cursor(folder.parent / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"),
    )


def _read_cursor(file: Path) -> Mapping[str, int] | None:
    if not file.is_file():
        return None
    try:
        stored = load_data(file)
    except ValueError as error:
        raise ConfigError(f"--load: {file} cannot be read ({error}); remove it to begin the data anew.") from error
    known = stored if isinstance(stored, dict) and not stored.keys().isdisjoint(_CURSOR) else {}
    values = {ours: known.get(theirs, 0) for theirs, ours in _CURSOR.items()}
    if not known or not all(isinstance(value, int) and value >= 0 for value in values.values()):
        raise ConfigError(f"--load: {file} holds no position in data; remove it to begin the data anew.")
    return values


class SavesTraining(Protocol):
    """What a checkpoint needs of the learner; all methods are collective."""

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write model, optimizer, schedule and RNG into an empty folder."""
        ...

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read what `save` wrote."""
        ...

    def weights(self, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Yield all weights under Hugging Face names in buckets."""
        ...


class SavesRollouts(Protocol):
    """What a checkpoint needs of the source of rollouts."""

    def state_dict(self) -> Mapping[str, Json]:
        """Return the JSON-compatible state after the rollouts taken so far."""
        ...

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state."""
        ...


def begin(config: CheckpointConfig, run: ForeignRun | None, learner: SavesTraining, rollouts: SavesRollouts) -> int:
    """Load what --load names, if anything, and return the id of the first rollout.

    Args:
        run: of slime or miles, whose checkpoint --load names.
    """
    weights = _weights_to_take(config)
    if run is not None:
        for line in run.notices():
            _logger.info(line)
        learner.load(run.folder, weights_only=run.num_steps is None, with_rng=False)
        if run.rollouts is not None:
            rollouts.load_state_dict(run.rollouts)
        return run.next_rollout_id
    if weights is not None:
        _logger.info("%s gives its weights alone: starting anew with a fresh optimizer", weights)
        learner.load(weights, weights_only=True, with_rng=False)
    elif config.load is not None:
        start = f"the weights of --ref-load {config.ref_load}" if config.ref_load else "--hf-checkpoint"
        _logger.info("no checkpoint in --load %s: starting anew from %s", config.load, start)
    return config.start_rollout_id or 0


def _weights_to_take(config: CheckpointConfig) -> Path | None:
    """Return the checkpoint whose weights alone a run starts from; None: --load names none."""
    foreign = foreign_checkpoint(config)
    if foreign is None and config.finetune and config.load is not None and Iterations(config.load).newest_first():
        return find_checkpoint(config.load, step=config.ckpt_step)
    return foreign
