"""The start of a run that has no checkpoint of a run here: other weights, or a run of slime or miles that goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from qwench.checkpoints.folders import foreign_checkpoint
from qwench.checkpoints.formats.iterations import Iterations
from qwench.checkpoints.formats.sources import find_checkpoint
from qwench.checkpoints.reference_run import ReferenceRun
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.samples import Json
from qwench.wire.portions import WeightBucket

_logger = logging.getLogger(__name__)


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


def begin(config: CheckpointConfig, run: ReferenceRun | None, learner: SavesTraining, rollouts: SavesRollouts) -> int:
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
