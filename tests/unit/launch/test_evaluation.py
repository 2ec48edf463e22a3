"""Which folder an evaluation may write its results into, and what it writes there."""

import json
from pathlib import Path

import pytest

from qwench.errors import ConfigError
from qwench.launch.evaluation import _write_results, own_eval_folder
from qwench.rollout.evaluate import EvalResult
from qwench.samples import Group, Prompt, Sample

FLAGS = {"--hf-checkpoint": "model", "--eval-output": "out", "--log-level": "info"}


def test_the_same_evaluation_may_replace_its_results_and_another_one_may_not(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    own_eval_folder(folder, FLAGS, writes=False)
    assert not folder.exists(), "a dry run writes nothing"
    own_eval_folder(folder, FLAGS, writes=True)
    assert json.loads((folder / "qwench_eval.json").read_text()) == {"--hf-checkpoint": "model"}
    same = {**FLAGS, "--eval-output": str(folder), "--log-level": "debug", "--dry-run": "true"}
    own_eval_folder(folder, same, writes=True)
    message = f"^--eval-output {folder} holds an evaluation of another model or of other flags; give another folder"
    with pytest.raises(ConfigError, match=message):
        own_eval_folder(folder, {**FLAGS, "--hf-checkpoint": "other"}, writes=False)


def test_a_folder_of_other_files_is_refused_and_the_lock_of_this_evaluation_is_none(tmp_path: Path) -> None:
    (tmp_path / "qwench.lock").touch()
    own_eval_folder(tmp_path, FLAGS, writes=False)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds files that no evaluation wrote \(notes.txt\)"):
        own_eval_folder(tmp_path, FLAGS, writes=True)


def test_metrics_and_a_line_for_each_response_are_written(tmp_path: Path) -> None:
    samples = [
        Sample(prompt=Prompt(text=text, token_ids=(1,)), sample_id=i, group_id=0, response="b", reward=1.0)
        for i, text in enumerate("xy")
    ]
    _write_results(tmp_path, {"eval/one": 0.5}, [EvalResult(name="one", groups=[Group(group_id=0, samples=samples)])])
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"eval/one": 0.5}
    lines = (tmp_path / "one.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(json.dumps(sample.to_record())) for sample in samples]
