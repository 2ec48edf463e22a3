"""Save the whole state of a run, and find it again.

    iter_0000020/model, optimizer, lr_scheduler, rng.pt     written by the learner, all ranks together
                 rollouts.json                              position in the data; groups unfinished, in flight, finished ahead
                 meta.json                                  identity and manifest; written last

A kill at any moment leaves the previous checkpoint or the new one, never a state that looks whole and is not. The same
command started again continues from --save.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import orjson

from qwench.checkpoints.best import Criterion, improvement, read_best
from qwench.checkpoints.folders import (
    check_all_is_here,
    check_identity,
    check_load_folder,
    hf_folder,
    open_save_folder,
)
from qwench.checkpoints.formats.iterations import Iterations
from qwench.checkpoints.manifest import amend_manifest, read_manifest, write_manifest
from qwench.checkpoints.saved import Saved, newest_whole, sources
from qwench.checkpoints.starting import ForeignRun, SavesRollouts, SavesTraining, begin, read_foreign_run
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.errors import CheckpointError, ConfigError, counted
from qwench.files import readable_size, trouble, written
from qwench.observability.console import Console
from qwench.observability.timing import PhaseTimer
from qwench.observability.waiting import waiting
from qwench.samples import Json
from qwench.wire.portions import WeightBucket

_logger = logging.getLogger(__name__)
_ROLLOUTS, _RNG = "rollouts.json", "rng.pt"
_EXPORT_BUCKET_BYTES = 512 * 1024**2

HfWriter = Callable[[Path, Iterator[WeightBucket]], None]
"""Writes a Hugging Face folder, whole or not at all: `models.hf.write_hf_checkpoint` with its source bound."""


AfterSave = Callable[[int, Path, Path | None], object]
"""(rollout, folder of its checkpoint, folder of its export or None)."""


class CheckpointManager:
    """See the module docstring. Every rank of the learner holds one; only the main rank renames and deletes."""

    def __init__(
        self,
        config: CheckpointConfig,
        identity: Mapping[str, Json],
        console: Console,
        *,
        write_hf: HfWriter | None = None,
        timer: PhaseTimer | None = None,
        flags: Mapping[str, str] | None = None,
        steps_per_rollout: int = 1,
        is_main: bool = True,
        best: Criterion | None = None,
        barrier: Callable[[], None] = lambda: None,
        after_save: AfterSave | None = None,
    ) -> None:
        """Check the folders of --save and --load, and mark --save as this run's.

        Args:
            identity: Facts, JSON-compatible, that a checkpoint and the run that resumes from it must share.
            flags: The run's flags by name, kept with each checkpoint; a resumed run says which have changed.
            steps_per_rollout: Optimizer steps of a rollout in this run.
            best: By what --keep-best compares checkpoints. None: none is kept for being the best.
            barrier: Waits for all ranks of the learner. after_save: The user's function, called by the main rank.

        Raises:
            ConfigError: see `folders`.
        """
        assert config.save_hf is None or write_hf is not None, "--save-hf needs a writer"
        self._config = config
        self._identity = dict(identity)
        self._console = console
        self._write_hf = write_hf
        self._timer = timer or PhaseTimer()
        self._is_main = is_main
        self._barrier, self._after_save = barrier, after_save
        self._iterations = Iterations(config.save) if config.save is not None else None
        self._failed_exports: list[str] = []
        self._criterion = best
        self._next_rollout_id = 0
        """Where the newest checkpoint resumes; 0 without one."""
        self._flags = dict(flags or {})
        self._steps_per_rollout = steps_per_rollout
        check_load_folder(config, identity)
        self._lock = open_save_folder(config, identity) if is_main else None
        self._best = read_best(config.save) if config.save is not None and best is not None else None

    @cached_property
    def saved(self) -> Saved | None:
        """The newest whole checkpoint, found and verified once; None: there is none.

        Raises:
            CheckpointError: there are checkpoints, but all of them are damaged.
            ConfigError: the checkpoint is of another model or algorithm, or has no optimizer and --no-load-optim is not given.
        """
        for source in sources(self._config, self._iterations):
            if (found := newest_whole(source, step=self._config.ckpt_step)) is not None:
                number, meta = found
                folder, iteration, own = source.folder(number), int(meta["iteration"]), source is self._iterations
                if own and self._config.number(iteration) != number:
                    raise ConfigError(f"{folder} has {iteration} rollouts learned; give the --save-numbering of its run.")
                check_identity(meta["identity"], self._identity, what=str(folder))
                if not self._config.no_load_optim and not meta["has_optimizer"]:
                    raise ConfigError(f"{folder} was written with --no-save-optim and has no optimizer; give --no-load-optim.")
                rollouts = json.loads((folder / _ROLLOUTS).read_bytes())
                saved = Saved(folder=folder, iteration=iteration, meta=meta, rollouts=rollouts, is_own=own)
                saved.check_held(self._flags)
                if self._config.use_checkpoint_opt_param_scheduler:
                    saved.check_schedule(self._flags)
                return saved
        return None

    @cached_property
    def foreign_run(self) -> ForeignRun | None:
        """The run of slime or miles that goes on here; None: there is none, or a checkpoint of ours comes first.

        Raises:
            ConfigError: see `read_foreign_run`.
        """
        return None if self.saved is not None else read_foreign_run(self._config)

    def train_steps(self, rollout_id: int) -> int:
        """Return how many optimizer steps come before a rollout, those of the run before a resume counted in."""
        first, steps = 0, 0
        if self.saved is not None:
            first, steps = self.saved.iteration, self.saved.train_steps(self._steps_per_rollout)
        elif self.foreign_run is not None:
            first, steps = self.foreign_run.next_rollout_id, self.foreign_run.num_steps or 0
        return steps + (rollout_id - first) * self._steps_per_rollout

    def restore(self, learner: SavesTraining, rollouts: SavesRollouts) -> int:
        """Load the newest whole checkpoint, if there is one, and return the id of the first rollout to do.

        Raises:
            QwenchError: see `saved`.
        """
        self._barrier()
        saved = self.saved
        if saved is not None:
            self._load(saved, learner, rollouts)
            self._next_rollout_id = saved.iteration
            if saved.is_own:
                self._export_again(saved.iteration - 1, learner)
            return saved.iteration
        return begin(self._config, self.foreign_run, learner, rollouts)

    @property
    def ended_by(self) -> str | None:
        """Return the flag that ended the run in the checkpoint with which this one goes on; None: none did."""
        return None if self.saved is None or not self.saved.is_own else self.saved.ended_by

    def save(
        self,
        next_rollout_id: int,
        learner: SavesTraining,
        rollouts: SavesRollouts,
        *,
        with_export: bool = True,
        ended_by: str | None = None,
    ) -> None:
        """Write a checkpoint that resumes with `next_rollout_id`, delete old ones, then export; without --save do nothing.

        Args:
            ended_by: the --stop-metric, or the other flag, that ends the run here.

        Raises:
            CheckpointError: it could not be written; the checkpoints before it are untouched, what was written is removed.
        """
        if self._iterations is None:
            return
        with self._timer.phase("save"), self._console.phase("save"), waiting(f"checkpoint {next_rollout_id}"):
            try:
                self._write(self._iterations, next_rollout_id, learner, rollouts, ended_by=ended_by)
            except OSError as error:
                raise self._not_written(self._iterations, next_rollout_id, error) from error
            self._next_rollout_id = next_rollout_id
            if with_export:
                self._export(next_rollout_id - 1, learner)
            if self._after_save is not None and self._is_main:
                template = self._config.save_hf if with_export else None
                exported = None if template is None else hf_folder(template, next_rollout_id - 1)
                folder = self._iterations.folder(self._config.number(next_rollout_id))
                self._after_save(next_rollout_id - 1, folder, exported)

    def note_end(self, next_rollout_id: int, ended_by: str | None) -> bool:
        """Note in the checkpoint of `next_rollout_id` that the run ends there; tell whether it needs no other one.

        Args:
            ended_by: see `save`.

        Raises:
            OutputError: the note could not be written.
        """
        if self._iterations is None or next_rollout_id == 0:
            return True
        number = self._config.number(next_rollout_id)
        if number not in self._iterations.newest_first():
            return False
        if self._is_main:
            with written(f"--save {self._config.save}", self._iterations.root):
                amend_manifest(self._iterations.folder(number), {"ended_by": ended_by})
        return True

    def save_stopped(self, next_rollout_id: int, learner: SavesTraining, rollouts: SavesRollouts) -> str:
        """Write a checkpoint of a run that a signal ends, and return a sentence about it.

        The resumed run writes the export: there may be no time for it now.

        Raises:
            CheckpointError: see `save`.
        """
        if next_rollout_id == 0:
            return "Nothing was learned yet."
        if self._iterations is None:
            return f"What was learned from {counted(next_rollout_id, 'rollout')} is lost: --save is not given."
        if next_rollout_id != self._next_rollout_id:
            self.save(next_rollout_id, learner, rollouts, with_export=False)
        number = self._config.number(next_rollout_id)
        return f"Checkpoint {number} is in --save {self._config.save}; the same command continues with it."

    def is_best(self, rollout_id: int, evaluated: Mapping[str, float]) -> bool:
        """Tell whether the weights after `rollout_id` rollouts are to be kept as the best so far."""
        return self._criterion is not None and bool(improvement(self._best, self._criterion, evaluated, iteration=rollout_id))

    @property
    def best_iteration(self) -> int:
        """Return how many rollouts the best weights so far have learned from; 0 where none were measured."""
        best, criterion = self._best, self._criterion
        return 0 if best is None or criterion is None or best.metric != criterion.metric else best.iteration

    def keep_best(
        self, rollout_id: int, evaluated: Mapping[str, float], learner: SavesTraining, rollouts: SavesRollouts
    ) -> None:
        """Keep the checkpoint after `rollout_id` rollouts as the best one; write it, if it was not due.

        Raises:
            CheckpointError: see `save`.
        """
        assert self._iterations is not None and self._criterion is not None, "verb_checks requires --save for --keep-best"
        if rollout_id not in self._iterations.newest_first():
            self.save(rollout_id, learner, rollouts)
        self._best = improvement(self._best, self._criterion, evaluated, iteration=rollout_id)
        if self._is_main and self._best is not None:
            self._best.write(self._iterations.root)

    def finish(self) -> None:
        """Give the folder free, and say at the end of a run which exports are missing.

        Raises:
            CheckpointError: an export of --save-hf failed; the checkpoints are whole.
        """
        if self._lock is not None:
            self._lock.release()
        if self._failed_exports:
            raise CheckpointError(
                f"--save-hf {self._config.save_hf}: {len(self._failed_exports)} exports failed, the last: "
                f"{self._failed_exports[-1]}. The checkpoints in --save {self._config.save} are whole: `qwench convert` makes "
                "exports of them."
            )

    def _load(self, saved: Saved, learner: SavesTraining, rollouts: SavesRollouts) -> None:
        _logger.info("resuming from %s", saved.folder)
        for line in saved.changes(self._flags):
            _logger.info(line)
        with waiting(f"checkpoint {saved.folder}"):
            learner.load(saved.folder, weights_only=self._config.no_load_optim, with_rng=not self._config.no_load_rng)
        rollouts.load_state_dict(saved.rollouts)

    def _export(self, rollout_id: int, learner: SavesTraining) -> None:
        """Write the Hugging Face folder of --save-hf. A failure costs the export only: it is said now and at the end.

        The other ranks only take part in gathering the weights.
        """
        if self._config.save_hf is None or self._write_hf is None:
            return
        buckets = learner.weights(bucket_bytes=_EXPORT_BUCKET_BYTES)
        folder = hf_folder(self._config.save_hf, rollout_id)
        if self._is_main:
            try:
                self._write_hf(folder, buckets)
            except (OSError, CheckpointError) as error:
                why = trouble(error, folder) if isinstance(error, OSError) else str(error)
                self._failed_exports.append(f"{folder}: {why}")
                _logger.warning("the export to --save-hf %s", self._failed_exports[-1])
        for _ in buckets:  # gathering is collective: every rank goes to its end
            pass

    def _export_again(self, rollout_id: int, learner: SavesTraining) -> None:
        """Write the export that a run killed after its checkpoint did not write."""
        if self._config.save_hf is not None and not hf_folder(self._config.save_hf, rollout_id).exists():
            self._export(rollout_id, learner)

    def _not_written(self, iterations: Iterations, iteration: int, error: OSError) -> CheckpointError:
        """Remove what was written of a checkpoint, and return the error that says so, with the room there is."""
        temporary = iterations.temporary(self._config.number(iteration))
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        why = trouble(error, temporary)
        if self._is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        return CheckpointError(
            f"checkpoint {iteration} could not be written to --save {self._config.save} ({why}; "
            f"{readable_size(size)} of it were written and are removed). Make room; the same command then goes on "
            "from the checkpoint before, or from the start where there is none."
        )

    def _write(
        self,
        iterations: Iterations,
        iteration: int,
        learner: SavesTraining,
        rollouts: SavesRollouts,
        *,
        ended_by: str | None,
    ) -> None:
        number = self._config.number(iteration)
        folder = iterations.temporary(number)
        if self._is_main:
            iterations.begin(number)
        self._barrier()
        has_optimizer = not self._config.no_save_optim
        learner.save(folder, with_optimizer=has_optimizer)
        self._barrier()
        if self._is_main:
            check_all_is_here(folder)
            if self._config.no_save_rng:
                (folder / _RNG).unlink(missing_ok=True)
            (folder / _ROLLOUTS).write_bytes(_to_json(rollouts.state_dict()))
            facts: dict[str, Json] = {"iteration": iteration, "identity": self._identity, "has_optimizer": has_optimizer}
            facts |= {"train_steps": self.train_steps(iteration), "flags": self._flags, "ended_by": ended_by}
            write_manifest(folder, facts)
            iterations.complete(number)
            self._prune(iterations, number)
        self._barrier()

    def _prune(self, iterations: Iterations, newest: int) -> None:
        """Delete old checkpoints, once the newest was read back as it was written."""
        spared = None if self._best is None else self._best.iteration
        keep, interval = self._config.keep_checkpoints, self._config.save_retain_interval
        if keep is None and interval is None:
            return
        read_manifest(iterations.folder(newest), with_content=False)
        if keep is not None:
            iterations.prune(keep, spared=spared)
        if interval is not None:
            iterations.thin_out(interval, first=self._config.number(0), spared=spared)


def _to_json(state: Mapping[str, Json]) -> bytes:
    try:
        return orjson.dumps(dict(state))
    except TypeError as error:
        raise CheckpointError(
            f"the state of the rollouts cannot be written as JSON ({error}); check sample metadata."
        ) from error
