import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from qwench.checkpoints.best import Best, Criterion, read_best
from qwench.checkpoints.manager import CheckpointManager
from qwench.checkpoints.manifest import note_checksums
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.observability.console import QuietConsole
from qwench.wire.portions import WeightBucket
from tests.fakes.learner import CountingLearner, CountingRollouts

IDENTITY = {"algorithm": "grpo", "num_layers": 2}


def manager_of(**flags) -> CheckpointManager:
    return CheckpointManager(CheckpointConfig(**flags), IDENTITY, QuietConsole())


def save_all(manager: CheckpointManager, *next_rollout_ids: int) -> None:
    for i in next_rollout_ids:
        manager.save(i, CountingLearner(100 + i), CountingRollouts(i))


def restored(**flags) -> tuple[int, int, int]:
    """Return first rollout id, the learner's value and the rollouts' position of a new process."""
    learner, rollouts = CountingLearner(), CountingRollouts()
    first = manager_of(**flags).restore(learner, rollouts)
    return first, learner.value, rollouts.taken


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "qwench.lock")


def test_same_command_continues_from_its_last_save(tmp_path):
    manager = manager_of(save=tmp_path / "run")
    assert manager.restore(CountingLearner(), CountingRollouts()) == 0
    save_all(manager, 1, 2)
    assert restored(save=tmp_path / "run") == (2, 102, 2)
    assert restored(save=tmp_path / "run", load=tmp_path / "run") == (2, 102, 2)


def test_a_checkpoint_says_which_metric_ended_its_run(tmp_path):
    manager_of(save=tmp_path).save(3, CountingLearner(), CountingRollouts(3), ended_by="loss<=1")
    assert manager_of(save=tmp_path).ended_by == "loss<=1"
    assert manager_of(save=tmp_path / "other", load=tmp_path).ended_by is None  # another run may begin there
    save_all(manager_of(save=tmp_path), 4)
    assert manager_of(save=tmp_path).ended_by is None
    manager = manager_of(save=tmp_path)
    assert manager.note_end(4, "eval/set>=0.5") and not manager.note_end(5, "eval/set>=0.5")
    assert manager_of(save=tmp_path).ended_by == "eval/set>=0.5"
    assert restored(save=tmp_path) == (4, 104, 4), "the checkpoint is whole"
    assert manager_of().note_end(4, "eval/set>=0.5"), "without --save there is none to note it in"


def test_layout_is_the_documented_one(tmp_path):
    save_all(manager_of(save=tmp_path), 20)
    assert names_in(tmp_path) == ["iter_0000020", "latest_checkpointed_iteration.txt", "qwench_run.json"]
    assert names_in(tmp_path / "iter_0000020") == ["lr_scheduler", "meta.json", "model", "optimizer", "rng.pt", "rollouts.json"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "20\n"


class Elsewhere(CountingLearner):
    """Its ranks are on nodes that do not see the folder: all of them, or all but the one that writes the metadata."""

    def __init__(self, shard: str | None) -> None:
        super().__init__()
        self._shard = shard

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        if self._shard is None:
            return
        dcp.save({"weight": torch.ones(3)}, checkpoint_id=folder / "model")
        (folder / "model" / self._shard).unlink()


@pytest.mark.parametrize(("shard", "words"), [(None, "wrote nothing into"), ("__0_0.distcp", "is missing")])
def test_a_checkpoint_that_ranks_wrote_elsewhere_is_not_one_and_no_older_one_goes(tmp_path, shard, words):
    manager = manager_of(save=tmp_path, keep_checkpoints=1)
    save_all(manager, 1)
    with pytest.raises(CheckpointError, match=f"{words}.*--save must be a folder that every node sees"):
        manager.save(2, Elsewhere(shard), CountingRollouts(2))
    assert restored(save=tmp_path, keep_checkpoints=1) == (1, 101, 1)


def test_load_folder_of_an_earlier_run_is_read_once_then_the_own_folder(tmp_path):
    save_all(manager_of(save=tmp_path / "old"), 5)
    flags = {"save": tmp_path / "new", "load": tmp_path / "old"}
    assert restored(**flags) == (5, 105, 5)
    save_all(manager_of(**flags), 6)
    assert restored(**flags) == (6, 106, 6)


def test_ckpt_step_picks_an_older_checkpoint_and_what_follows_replaces_the_newer_ones(tmp_path):
    flags = {"save": tmp_path, "load": tmp_path}
    save_all(manager_of(**flags), 1, 2, 3)
    manager = manager_of(**flags, ckpt_step=1)
    learner = CountingLearner()
    assert manager.restore(learner, CountingRollouts()) == 1
    assert learner.value == 101
    manager.save(2, CountingLearner(202), CountingRollouts(2))
    assert restored(**flags) == (2, 202, 2)  # not 3, which belongs to the abandoned continuation
    with pytest.raises(ConfigError, match=r"no checkpoint of --ckpt-step 9; it has \[2, 1\]"):
        restored(**flags, ckpt_step=9)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, ["model", "optimizer", "rng"]),
        ({"no_load_rng": True}, ["model", "optimizer"]),
        ({"no_load_optim": True}, ["model"]),
    ],
)
def test_what_is_loaded_follows_the_flags(tmp_path, flags, parts):
    save_all(manager_of(save=tmp_path), 1)
    learner = CountingLearner()
    manager_of(save=tmp_path, **flags).restore(learner, CountingRollouts())
    assert learner.loaded == parts


def test_checkpoint_without_optimizer_says_so(tmp_path):
    save_all(manager_of(save=tmp_path, no_save_optim=True), 1)
    assert "optimizer" not in names_in(tmp_path / "iter_0000001")
    with pytest.raises(ConfigError, match=r"--no-save-optim and has no optimizer; give --no-load-optim"):
        restored(save=tmp_path)
    assert restored(save=tmp_path, no_load_optim=True) == (1, 101, 1)


def test_random_states_can_be_left_out(tmp_path):
    save_all(manager_of(save=tmp_path, no_save_rng=True), 1)
    assert "rng.pt" not in names_in(tmp_path / "iter_0000001")
    assert restored(save=tmp_path, no_load_rng=True) == (1, 101, 1)


def test_only_the_newest_are_kept(tmp_path):
    save_all(manager_of(save=tmp_path, keep_checkpoints=2), 1, 2, 3, 10)
    assert names_in(tmp_path) == ["iter_0000003", "iter_0000010", "latest_checkpointed_iteration.txt", "qwench_run.json"]


def lowest_loss(folder: Path, **flags) -> CheckpointManager:
    best = Criterion(metric="eval/a/loss", higher_is_better=False)
    return CheckpointManager(CheckpointConfig(save=folder, keep_best=True, **flags), IDENTITY, QuietConsole(), best=best)


def evaluate(manager: CheckpointManager, rollout_id: int, loss: float) -> None:
    """Evaluate the weights after `rollout_id` rollouts as the controller does."""
    if manager.is_best(rollout_id, {"eval/a/loss": loss}):
        learner, rollouts = CountingLearner(100 + rollout_id), CountingRollouts(rollout_id)
        manager.keep_best(rollout_id, {"eval/a/loss": loss}, learner, rollouts)


def test_the_best_checkpoint_outlives_newer_ones_until_a_better_one_comes(tmp_path):
    manager, left = lowest_loss(tmp_path, keep_checkpoints=1), []
    for rollout_id, loss in [(1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (5, 0.2), (6, 0.2)]:
        save_all(manager, rollout_id)
        evaluate(manager, rollout_id, loss)
        left.append([int(path.name[5:]) for path in sorted(tmp_path.glob("iter_*"))])
    assert left == [[1], [1, 2], [2, 3], [2, 4], [2, 5], [5, 6]]


def test_a_best_evaluation_between_two_saves_is_saved(tmp_path):
    evaluate(lowest_loss(tmp_path), 7, 0.5)
    assert restored(save=tmp_path) == (7, 107, 7)


def test_a_resumed_run_knows_the_best_of_the_run_before(tmp_path):
    manager = lowest_loss(tmp_path)
    evaluate(manager, 7, 0.5)
    manager.finish()
    resumed = lowest_loss(tmp_path)
    assert (manager.best_iteration, resumed.best_iteration, manager_of(save=tmp_path).best_iteration) == (7, 7, 0)
    assert not resumed.is_best(8, {"eval/a/loss": 0.5})
    assert resumed.is_best(8, {"eval/a/loss": 0.4})
    assert read_best(tmp_path) == Best(iteration=7, metric="eval/a/loss", value=0.5)


def test_without_keep_best_no_evaluation_is_one(tmp_path):
    assert not manager_of(save=tmp_path).is_best(1, {"eval/a/loss": 0.5})


def test_nothing_is_deleted_when_the_new_checkpoint_is_not_as_it_was_written(tmp_path, monkeypatch):
    manager = manager_of(save=tmp_path, keep_checkpoints=1)
    save_all(manager, 1)
    rename = Path.replace

    def rename_and_lose_a_byte(source: Path, target: Path) -> Path:
        final = rename(source, target)
        if final.name == "iter_0000002":
            (final / "model" / "__0_0.distcp").write_bytes(b"short")
        return final

    monkeypatch.setattr(Path, "replace", rename_and_lose_a_byte)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has size 5, not 400 as written"):
        save_all(manager, 2)
    assert restored(save=tmp_path) == (1, 101, 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(b"0") if path.suffix == ".json" else len(content) // 2
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "file missing": lambda folder: (folder / "optimizer" / "__0_0.distcp").unlink(),
    "file cut short": lambda folder: (folder / "model" / "__0_0.distcp").write_bytes(b"103\n"),
    "byte flipped": lambda folder: (folder / "rng.pt").write_bytes(b"rnG"),
    "bit flipped in tensors": lambda folder: flip_a_bit(folder / "model" / "__0_0.distcp"),
    "bit flipped in meta.json": lambda folder: flip_a_bit(folder / "meta.json"),
    "no meta.json": lambda folder: (folder / "meta.json").unlink(),
    "meta.json cut short": lambda folder: (folder / "meta.json").write_text('{"files": {'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_newest_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    save_all(manager_of(save=tmp_path), 2, 3)
    damage(tmp_path / "iter_0000003")
    learner, rollouts = CountingLearner(), CountingRollouts()
    caplog.clear()
    assert CheckpointManager(CheckpointConfig(save=tmp_path), IDENTITY, QuietConsole()).restore(learner, rollouts) == 2
    assert learner.value == 102
    (_, _, damaged), resumed = caplog.record_tuples
    assert damaged.startswith("checkpoint 3 is damaged and passed over: ")
    assert resumed == ("qwench.checkpoints.manager", logging.INFO, f"resuming from {tmp_path / 'iter_0000002'}")
    save_all(manager_of(save=tmp_path), 3)  # the repeated rollout's checkpoint takes the damaged one's place
    assert restored(save=tmp_path) == (3, 103, 3)


def test_all_damaged_is_an_error_and_never_a_fresh_start(tmp_path):
    save_all(manager_of(save=tmp_path), 2)
    DAMAGES["no meta.json"](tmp_path / "iter_0000002")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole \(damaged: 2\)"):
        restored(save=tmp_path)


def test_a_bit_flipped_in_a_file_over_16_mib_is_found(tmp_path):
    class Large(CountingLearner):
        def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
            super().save(folder, with_optimizer=with_optimizer)
            (folder / "optimizer" / "__0_0.distcp").write_bytes(bytes(17 * 1024**2))

    save_all(manager_of(save=tmp_path), 2)
    manager_of(save=tmp_path).save(3, Large(103), CountingRollouts(3))
    with (tmp_path / "iter_0000003" / "optimizer" / "__0_0.distcp").open("r+b") as stream:
        stream.seek(16_999_999)
        stream.write(b"\x10")
    assert restored(save=tmp_path) == (2, 102, 2)


def test_checksums_that_ranks_noted_are_what_the_files_are_compared_with(tmp_path):
    class Notes(CountingLearner):
        """Notes a checksum, then its file changes on the way to the disk."""

        def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
            super().save(folder, with_optimizer=with_optimizer)
            file = folder / "model" / "__0_0.distcp"
            note_checksums(file.parent, [file], rank=0)
            file.write_bytes(file.read_bytes().replace(b"103", b"113"))

    save_all(manager_of(save=tmp_path), 2)
    manager_of(save=tmp_path).save(3, Notes(103), CountingRollouts(3))
    assert restored(save=tmp_path) == (2, 102, 2)


@pytest.mark.parametrize("pointer", [None, "rubbish"])
def test_lost_pointer_means_the_newest_whole_folder(tmp_path, pointer):
    save_all(manager_of(save=tmp_path), 2, 3)
    path = tmp_path / "latest_checkpointed_iteration.txt"
    path.unlink() if pointer is None else path.write_text(pointer)
    assert restored(save=tmp_path) == (3, 103, 3)


def test_empty_load_is_an_error_unless_there_is_something_else_to_start_from(tmp_path, caplog):
    flags = {"load": tmp_path / "absent", "save": tmp_path / "run"}
    with pytest.raises(ConfigError, match=r"--load .*absent has no checkpoint; give .* --ref-load"):
        manager_of(**flags)
    manager = CheckpointManager(CheckpointConfig(**flags, ref_load=tmp_path / "base"), IDENTITY, QuietConsole())
    assert manager.restore(CountingLearner(), CountingRollouts()) == 0
    start = f"starting anew from the weights of --ref-load {tmp_path / 'base'}"
    assert caplog.messages == [f"no checkpoint in --load {tmp_path / 'absent'}: {start}"]
    assert restored(load=tmp_path / "run", save=tmp_path / "deep" / ".." / "run") == (0, 0, 0)


def test_without_save_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_all(manager_of(), 1)
    assert names_in(tmp_path) == []


def test_full_disk_leaves_the_checkpoints_before_it(tmp_path):
    class FullDisk(CountingLearner):
        def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
            (folder / "model").mkdir()
            raise OSError(28, "No space left on device")

    manager = manager_of(save=tmp_path)
    save_all(manager, 1)
    said = r"checkpoint 2 could not .*\(No space left on device; .*iB free; 0.0 KiB of it were .* where there is none\.$"
    with pytest.raises(CheckpointError, match=said):
        manager.save(2, FullDisk(), CountingRollouts())
    assert not (tmp_path / "iter_0000002.writing").exists()
    assert restored(save=tmp_path) == (1, 101, 1)
    assert names_in(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt", "qwench_run.json"]


def test_state_that_is_not_json_is_named(tmp_path):
    rollouts = CountingRollouts()
    rollouts.state_dict = lambda: {"tool": object()}
    with pytest.raises(CheckpointError, match="state of the rollouts cannot be written as JSON"):
        manager_of(save=tmp_path).save(1, CountingLearner(), rollouts)


def test_export_goes_with_every_checkpoint_under_the_last_rollouts_id(tmp_path):
    written: list[tuple[Path, int, bool]] = []

    def write_hf(folder: Path, buckets: Iterator[WeightBucket]) -> None:
        value = next(iter(dict(bucket)["value"].item() for bucket in buckets))
        written.append((folder, value, (tmp_path / "iter_0000020").exists()))

    config = CheckpointConfig(save=tmp_path, save_hf=str(tmp_path / "hf_{rollout_id}"))
    CheckpointManager(config, IDENTITY, QuietConsole(), write_hf=write_hf).save(20, CountingLearner(7), CountingRollouts())
    assert written == [(tmp_path / "hf_19", 7, True)]  # after the checkpoint: nothing optional can cost it


def test_a_failed_export_costs_only_itself_and_is_said_at_the_end(tmp_path, caplog):
    gathered: list[str] = []

    class Gathers(CountingLearner):
        def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[WeightBucket]:
            yield []
            gathered.append("to the end")

    def write_hf(folder: Path, buckets: Iterator[WeightBucket]) -> None:
        next(buckets)
        raise OSError(28, "No space left on device")

    config = CheckpointConfig(save=tmp_path, save_hf=str(tmp_path / "hf_{rollout_id}"))
    manager = CheckpointManager(config, IDENTITY, QuietConsole(), write_hf=write_hf)
    manager.save(3, Gathers(103), CountingRollouts(3))
    assert gathered == ["to the end"]
    assert caplog.messages[-1].startswith(f"the export to --save-hf {tmp_path}/hf_2: No space left on device; ")
    with pytest.raises(CheckpointError, match=r"--save-hf \S+: 1 exports failed, the last: .*hf_2.* are whole"):
        manager.finish()
    assert restored(save=tmp_path) == (3, 103, 3)


def test_an_export_that_a_kill_prevented_is_written_on_resume(tmp_path):
    written: list[Path] = []

    def write_hf(folder: Path, buckets: Iterator[WeightBucket]) -> None:
        written.append(folder)
        folder.mkdir()
        list(buckets)

    save_all(manager_of(save=tmp_path / "run"), 3)
    for _ in range(2):
        config = CheckpointConfig(save=tmp_path / "run", save_hf=str(tmp_path / "hf_{rollout_id}"))
        CheckpointManager(config, IDENTITY, QuietConsole(), write_hf=write_hf).restore(CountingLearner(), CountingRollouts())
    assert written == [tmp_path / "hf_2"]


def test_other_ranks_take_part_in_collectives_and_touch_no_files(tmp_path):
    events: list[str] = []

    class OtherRank(CountingLearner):
        def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
            events.append(f"save {folder.name}")

        def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[WeightBucket]:
            events.append("gather first bucket")
            yield []
            events.append("gather to the end")

    def write_hf(folder: Path, buckets: Iterator[WeightBucket]) -> None:
        raise AssertionError("the main rank writes")

    config = CheckpointConfig(save=tmp_path, save_hf=str(tmp_path / "hf"))
    manager = CheckpointManager(
        config, IDENTITY, QuietConsole(), write_hf=write_hf, is_main=False, barrier=lambda: events.append("barrier")
    )
    manager.save(3, OtherRank(), CountingRollouts())
    assert events == [
        *["barrier", "save iter_0000003.writing", "barrier", "barrier"],
        *["gather first bucket", "gather to the end"],
    ]
    assert names_in(tmp_path) == []
