"""What a run writes besides its checkpoints is its own: nothing of another run, or of the user, is replaced."""

import json
from pathlib import Path

import pytest

from qwench.config import Config
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.errors import ConfigError
from qwench.launch.outputs import claim_outputs
from qwench.observability.dumps import save_rollout
from qwench.samples import Rollout


def claim(*, save: Path | None = None, load: Path | None = None, log_dir: Path | None = None, dumps: str | None = None) -> str:
    return claim_outputs(
        Config(
            checkpoint=CheckpointConfig(save=save, load=load),
            logging=LoggingConfig(log_dir=log_dir),
            debug=DebugConfig(save_debug_rollout_data=dumps),
        )
    )


def test_the_logs_of_a_run_without_save_are_of_that_run_alone(tmp_path):
    claim(log_dir=tmp_path / "log")
    (tmp_path / "log" / "metrics.jsonl").write_text('{"train/step": 0}\n')
    with pytest.raises(ConfigError, match=r"^--log-dir .*log holds the metrics of another run; give another folder"):
        claim(log_dir=tmp_path / "log")


def test_the_log_folder_of_a_run_that_failed_before_its_first_step_may_be_used_again(tmp_path):
    for _ in range(3):
        claim(log_dir=tmp_path)
        for name in ("driver.log", "metrics.jsonl", "qwench_config.yaml"):
            (tmp_path / name).touch()


def test_the_same_save_goes_on_with_its_logs_and_another_one_does_not(tmp_path):
    log = tmp_path / "log"
    for _ in range(2):  # killed before its first checkpoint, and started again
        claim(save=tmp_path / "a", log_dir=log)
    (log / "metrics.jsonl").write_text('{"train/step": 0}\n')
    with pytest.raises(ConfigError, match="another run"):
        claim(save=tmp_path / "b", log_dir=log)


def test_a_run_that_loads_from_the_folder_of_the_logs_may_go_on_with_them(tmp_path):
    log = tmp_path / "log"
    claim(save=tmp_path / "a", log_dir=log)
    (log / "metrics.jsonl").write_text('{"train/step": 0}\n')
    for _ in range(2):
        claim(save=tmp_path / "b", load=tmp_path / "a", log_dir=log)


@pytest.mark.parametrize("name", ["notes.txt", "metrics.jsonl", "config.json"])
def test_a_log_folder_with_other_files_is_refused_and_stays_as_it_is(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"^--log-dir .* holds files that no run wrote \({name}\); give an empty or new"):
        claim(log_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_folders_of_the_run_itself_may_lie_in_its_log_folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "dumps").mkdir()
    claim(save=tmp_path / "checkpoints", log_dir=tmp_path, dumps=str(tmp_path / "dumps" / "{rollout_id}.jsonl"))


def test_logs_in_the_folder_of_save_need_no_mark(tmp_path):
    (tmp_path / "iter_0000001").mkdir()  # whether --save is ours is checked where it is opened
    claim(save=tmp_path, log_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001"]


def test_dumps_of_another_run_are_not_replaced(tmp_path):
    dumps = str(tmp_path / "rollout_{rollout_id}.jsonl")
    (tmp_path / "prompts.jsonl").touch()
    run = claim(dumps=dumps)
    save_rollout(dumps, Rollout(rollout_id=7, groups=[]), run=run)
    with pytest.raises(ConfigError, match=r"^--save-debug-rollout-data: .*rollout_7.jsonl is of another run; give another"):
        claim(dumps=dumps)


def test_a_run_that_starts_again_replaces_its_own_dumps(tmp_path):
    dumps = str(tmp_path / "{rollout_id}.jsonl")
    save_rollout(dumps, Rollout(rollout_id=0, groups=[]), run=claim(save=tmp_path / "run", dumps=dumps))
    assert claim(save=tmp_path / "run", dumps=dumps) == str(tmp_path / "run")


def test_a_file_that_no_run_wrote_is_no_dump_to_replace(tmp_path):
    (tmp_path / "3.jsonl").write_text("my notes\n")
    with pytest.raises(ConfigError, match=r"3.jsonl is of another run"):
        claim(save=tmp_path / "run", dumps=str(tmp_path / "{rollout_id}.jsonl"))


@pytest.mark.parametrize("dumps", ["{rollout_id}.jsonl", "rollout_data/{rollout_id}.jsonl"])
def test_dumps_do_not_go_into_a_models_folder(tmp_path, dumps):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ConfigError, match=r"^--save-debug-rollout-data: .* is the folder of a model; give another folder"):
        claim(dumps=str(tmp_path / dumps))


def test_the_folder_of_dump_details_holds_nothing_else(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"^--dump-details .* holds files that no run wrote \(thesis.txt\)"):
        claim(dumps=str(tmp_path / "rollout_data" / "{rollout_id}.jsonl"))
