from pathlib import Path

import pytest

from qwench.checkpoints.folders import check_load_folder, check_save_folder
from qwench.checkpoints.manager import CheckpointManager
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.errors import ConfigError
from tests.fakes.console import RecordingConsole
from tests.fakes.learner import CountingLearner, CountingRollouts

IDENTITY = {"algorithm": "grpo", "num_layers": 2}


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_new_and_empty_folders_are_marked_and_accepted_again(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "deep" / "new", tmp_path / "empty"):
        config = CheckpointConfig(save=folder)
        check_save_folder(config, IDENTITY)
        check_save_folder(config, IDENTITY)
        assert [path.name for path in folder.iterdir()] == ["qwench_run.json"]


def test_foreign_folder_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    before = content_of(tmp_path)
    with pytest.raises(ConfigError, match=r"--save .* not of a Qwench run \(thesis.tex\)"):
        check_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(("fact", "other"), [("algorithm", "sft"), ("num_layers", 28), ("hidden_size", 64)])
def test_folder_of_another_run_is_refused_by_the_fact_that_differs(tmp_path, fact, other):
    check_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)
    before = content_of(tmp_path)
    with pytest.raises(ConfigError, match=rf"--save .* is of a run with {fact} .*, this one has {other!r}"):
        check_save_folder(CheckpointConfig(save=tmp_path), IDENTITY | {fact: other})
    assert content_of(tmp_path) == before


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"--save .* cannot be written to"):
            check_save_folder(CheckpointConfig(save=folder), IDENTITY)


@pytest.mark.parametrize("marker", ["not json", "[1]"])
def test_damaged_marker_is_refused(tmp_path, marker):
    (tmp_path / "qwench_run.json").write_text(marker)
    with pytest.raises(ConfigError, match=r"--save .*: qwench_run.json"):
        check_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)


def test_kill_while_the_marker_was_written_leaves_an_empty_folder(tmp_path):
    (tmp_path / "qwench_run.json.writing").write_text('{"algo')
    check_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["qwench_run.json"]


def test_export_over_a_model_of_the_user_is_refused_at_the_start(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    before = content_of(tmp_path)
    with pytest.raises(ConfigError, match=r"--save-hf .*base: .* was not written by an export"):
        check_save_folder(CheckpointConfig(save=tmp_path / "run", save_hf=str(base)), IDENTITY)
    assert content_of(tmp_path) == before


def test_export_template_with_an_unknown_placeholder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"placeholder other than \{rollout_id\}"):
        check_save_folder(CheckpointConfig(save=tmp_path / "run", save_hf="hf_{step}"), IDENTITY)


def test_checkpoint_of_another_model_is_refused_by_load_before_anything_is_loaded(tmp_path):
    manager = CheckpointManager(CheckpointConfig(save=tmp_path), IDENTITY | {"num_layers": 28}, RecordingConsole())
    manager.save(1, CountingLearner(), CountingRollouts())
    with pytest.raises(ConfigError, match=r"--load .* is of a run with num_layers 28, this one has 2"):
        check_load_folder(CheckpointConfig(load=tmp_path), IDENTITY)
