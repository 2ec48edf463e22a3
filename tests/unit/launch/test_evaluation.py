"""What an evaluation checks and starts, which folder it may write its results into, and what it writes there."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwench.config.config import Config
from qwench.config.config_text import flag_values
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError
from qwench.launch import evaluation
from qwench.launch.evaluation import _write_results, own_eval_folder
from qwench.launch.inputs import Inputs
from qwench.rollout.evaluate import EvalResult
from qwench.samples import Group, Prompt, Sample
from tests.unit.launch.test_generation import eval_settings
from tests.unit.launch.test_placement import inputs_of

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


SETS = (eval_settings(name="one", path="a.jsonl", n_samples_per_eval_prompt=3), eval_settings(name="two", path="b.jsonl"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replace what reads, checks and starts by names; return what was done, in order."""
    done: list[object] = []

    def keep(name: str, result: object = None) -> Callable[..., object]:
        def act(*given: object, **options: object) -> object:
            done.append((name, *given, *([options] if options else [])))
            return result

        return act

    loaded = {one.name: SimpleNamespace(prompts=[one.name] * 2) for one in SETS}
    monkeypatch.setattr(evaluation, "read_eval_prompts", lambda inputs: loaded)
    evaluator = SimpleNamespace(
        run=keep("run", [RESULT]), summarize=keep("summarize", {"eval/one": 0.5}), evaluate=keep("evaluate", {"eval/one": 0.25})
    )
    generation = SimpleNamespace(close=keep("close"), evaluator=keep("evaluator", evaluator), engines="engines")
    results = {
        "make_servers": ("servers", "token"), "open_processes": "processes", "build_generation": generation,
    }  # fmt: skip
    for name in (
        "open_driver_log", "check_imports", "load_user_functions", "check_prompts", "check_ready", "own_results",
        "own_eval_folder", *results,
    ):  # fmt: skip
        monkeypatch.setattr(evaluation, name, keep(name, results.get(name)))
    return done


RESULT = EvalResult(name="one", groups=[])


def inputs_with(**section: object) -> Inputs:
    config = Config(
        evaluation=EvalConfig(**section), rollout=RolloutConfig(rollout_batch_size=2), logging=LoggingConfig(log_level="debug")
    )
    inputs = inputs_of(config)
    return replace(inputs, plan=replace(inputs.plan, eval_sets=SETS))


def names(done: list[object]) -> list[object]:
    return [one[0] for one in done]


def test_an_evaluation_checks_then_starts_then_writes(
    said: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_with(eval_output=tmp_path)
    monkeypatch.setattr(evaluation, "read_inputs", lambda config, plan: inputs if plan == "plan" else None)
    monkeypatch.setattr(evaluation, "describe_model", lambda inputs: "the model")
    evaluation.check(inputs.config, "plan")
    flags = flag_values(inputs.config)
    prompts = {"one": ["one"] * 2, "two": ["two"] * 2}
    checked = [
        ("check_imports", inputs.config, SETS),
        ("load_user_functions", inputs.config),
        *(("check_prompts", inputs.reward_of(one), prompts[one.name], {"may_come_graded": False}) for one in SETS),
        ("own_eval_folder", tmp_path, flags, {"writes": False}),
    ]
    assert said[:-1] == checked and said[-1][:2] == ("check_ready", inputs)
    assert list(said[-1][2]["prompts"]) == [*prompts.values()] and said[-1][2].keys() == {"prompts"}
    said.clear()
    monkeypatch.setattr(evaluation, "read_inputs", lambda config, plan: inputs if plan is inputs.plan else None)
    evaluation.evaluate(inputs.config, inputs.plan)
    assert said[0] == ("open_driver_log", "debug", inputs.console)
    started = said[7][2]
    assert names(said)[:7] == ["open_driver_log", *names(checked), "check_ready"] and said[7:] == [
        ("own_results", tmp_path, started),
        ("own_eval_folder", tmp_path, flags, {"writes": True}),
        ("open_processes", inputs, started),
        ("make_servers", inputs, "processes", {"with_weights": True}),
        ("build_generation", inputs, {"with_weights": True, "servers": "servers", "token": "token"}),
        ("evaluator", prompts),
        ("run", "engines"),
        ("summarize", [RESULT]),
        ("close",),
    ]
    assert inputs.console.lines == [
        "model     the model",
        "one       a.jsonl: 2 prompts x 3",
        "two       b.jsonl: 2 prompts x 1",
        "evaluation: one 0.5",
        f"written   {tmp_path}: metrics.json, and a file of responses for each set",
    ]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"eval/one": 0.5}


def test_an_evaluation_of_the_user_gives_metrics_alone(said: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_with(eval_function_path="a.b")
    monkeypatch.setattr(evaluation, "read_inputs", lambda config, plan: inputs)
    evaluation.evaluate(inputs.config, inputs.plan)
    assert names(said) == [
        "open_driver_log", "check_imports", "load_user_functions", "check_prompts", "check_prompts", "check_ready",
        "open_processes", "make_servers", "build_generation", "evaluator", "evaluate", "close",
    ]  # fmt: skip
    assert said[-2] == ("evaluate", "engines") and inputs.console.lines[-1] == "evaluation: one 0.25"


def test_rewards_that_do_not_fit_a_set_are_refused_with_its_name(said: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    sets = (SETS[0], replace(SETS[1], custom_generate_function_path="a.b"))
    inputs = inputs_with()

    def refuse(reward: object, prompts: list[str], *, may_come_graded: bool) -> None:
        if may_come_graded:
            raise ConfigError(f"no label in {prompts[0]}")

    monkeypatch.setattr(evaluation, "check_prompts", refuse)
    with pytest.raises(ConfigError, match=r"two.*: no label in two"):
        evaluation._check(replace(inputs, plan=replace(inputs.plan, eval_sets=sets)))
