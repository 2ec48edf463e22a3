"""What an evaluation checks and starts, which folder it may write its results into, and what it writes there."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwench.config.config import Config
from qwench.config.plan import RunPlan
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError
from qwench.files import LOCK
from qwench.launch import evaluation
from qwench.launch.evaluation import own_eval_folder
from qwench.launch.inputs import Inputs
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.rollout.evaluate import EvalResult
from qwench.samples import Group, Prompt, Sample
from tests.fakes.console import RecordingConsole
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


class Started:
    """Stands for the engines of an evaluation: keeps what they are made of, what they answer, and whether they run."""

    def __init__(self) -> None:
        self.running, self.made, self.prompts, self.logs = False, [], {}, []
        self.engines, self.console = "engines", RecordingConsole()

    def make(self, part: str):
        def act(inputs: Inputs, *given: object, **options: object) -> tuple[str, str]:
            assert isinstance(inputs, Inputs)
            self.made.append((part, options))
            return "servers", "token"

        return act

    def build(self, inputs: Inputs, **options: object) -> "Started":
        self.running = True
        self.made.append(("generation", options))
        return self

    def close(self) -> None:
        self.running = False

    def evaluator(self, prompts: dict[str, list[Prompt]]) -> SimpleNamespace:
        self.prompts = {name: [prompt.text for prompt in rows] for name, rows in prompts.items()}
        return SimpleNamespace(
            run=self.run, summarize=lambda results: {"eval/one": 0.5}, evaluate=lambda engines: {"eval/one": 0.25}
        )

    def run(self, engines: str) -> list[EvalResult]:
        assert self.running and engines == "engines"
        return [EvalResult(name="one", groups=[Group(group_id=0, samples=SAMPLES)])]


SAMPLES = [
    Sample(prompt=Prompt(text=text, token_ids=(1,)), sample_id=i, group_id=0, response="b", reward=1.0)
    for i, text in enumerate("xy")
]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Replace what needs a model or a machine: reading the checkpoint, the checks of the machine, and the engines."""
    tokenizer = build_small_tokenizer()

    def read(config: Config, plan: RunPlan) -> Inputs:
        return replace(inputs_of(config), plan=plan, console=engines.console, tokenizer=tokenizer)

    engines = Started()
    monkeypatch.setattr(evaluation, "read_inputs", read)
    monkeypatch.setattr(evaluation, "describe_model", lambda inputs: "the model")
    monkeypatch.setattr(evaluation, "check_ready", lambda inputs, *, prompts: [len(rows) for rows in prompts])
    monkeypatch.setattr(evaluation, "open_driver_log", lambda *given: engines.logs.append(given))
    monkeypatch.setattr(evaluation, "open_processes", engines.make("processes"))
    monkeypatch.setattr(evaluation, "make_servers", engines.make("servers"))
    monkeypatch.setattr(evaluation, "build_generation", engines.build)
    return engines


def evaluation_of(folder: Path, *, rm_type: str = "math", labels: tuple[str, ...] = ("1", "2"), **section: object):
    """Return the configuration and plan of an evaluation of two sets, the second of two rows."""
    rows = [json.dumps({"prompt": f"question {label}", "label": label}) + "\n" for label in labels]
    (folder / "a.jsonl").write_text(rows[0])
    (folder / "b.jsonl").write_text("".join(rows))
    sets = tuple(
        eval_settings(
            name=name, path=str(folder / file), n_samples_per_eval_prompt=count, input_key="prompt", label_key="label",
        )
        for name, file, count in (("one", "a.jsonl", 3), ("two", "b.jsonl", 1))
    )  # fmt: skip
    config = Config(
        evaluation=EvalConfig(**section), rollout=RolloutConfig(rollout_batch_size=2), reward=RewardConfig(rm_type=rm_type)
    )
    return config, replace(inputs_of(config).plan, eval_sets=sets)


def test_an_evaluation_says_and_writes_its_metrics_and_every_response(started: Started, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = evaluation_of(tmp_path, eval_output=out)
    evaluation.check(*given)
    assert not out.exists() and not started.made
    for _ in range(2):  # it may replace its own results
        evaluation.evaluate(*given)
        assert started.prompts == {"one": ["question 1"], "two": ["question 1", "question 2"]} and not started.running
        assert started.console.lines[-5:] == [
            "model     the model",
            f"one       {tmp_path}/a.jsonl: 1 prompt x 3",
            f"two       {tmp_path}/b.jsonl: 2 prompts x 1",
            "evaluation: one 0.5",
            f"written   {out}: metrics.json, and a file of responses for each set",
        ]
        assert json.loads((out / "metrics.json").read_text()) == {"eval/one": 0.5}
        lines = (out / "one.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [json.loads(json.dumps(sample.to_record())) for sample in SAMPLES]
    assert started.logs == [("info", started.console)] * 2
    with_weights = {"with_weights": True}
    assert started.made[1:3] == [
        ("servers", with_weights), ("generation", {**with_weights, "servers": "servers", "token": "token"}),
    ]  # fmt: skip


def test_an_evaluation_of_the_user_gives_metrics_alone(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = evaluation_of(tmp_path, eval_output=tmp_path / "out", eval_function_path="a.b")
    for name in ("check_imports", "load_user_functions"):  # there is no such function
        monkeypatch.setattr(evaluation, name, lambda config, *sets: None)
    evaluation.evaluate(*given)
    assert "evaluation: one 0.25" in started.console.lines and not started.running
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"metrics.json"}
    assert not (tmp_path / "out" / "one.jsonl").exists()


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"rm_type": "no-such"}, "^--rm-type 'no-such' is unknown"),
        ({"labels": ("1", "")}, "evaluation set two: .*label"),
        ({"eval_output": "taken"}, "--eval-output .*holds files that no evaluation wrote"),
    ],
)
def test_mistakes_are_found_before_anything_starts_or_is_written(
    started: Started, tmp_path: Path, faults: dict[str, object], said: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    out = tmp_path / str(faults.get("eval_output", "out"))
    given = evaluation_of(tmp_path, **faults | {"eval_output": out})
    for act in (evaluation.check, evaluation.evaluate):
        with pytest.raises(ConfigError, match=said):
            act(*given)
    assert not started.made and not (tmp_path / "out").exists() and not (out / "qwench_eval.json").exists()


def test_what_the_machine_lacks_is_found_before_anything_starts(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(inputs: Inputs, *, prompts: object) -> None:
        raise ConfigError(f"sets of {[len(rows) for rows in prompts]}")

    monkeypatch.setattr(evaluation, "check_ready", refuse)
    for act in (evaluation.check, evaluation.evaluate):
        with pytest.raises(ConfigError, match=r"^sets of \[1, 2\]$"):
            act(*evaluation_of(tmp_path))
    assert not started.made


def test_a_reward_need_not_be_named_where_a_generate_function_may_set_it(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("check_imports", "load_user_functions"):  # there is no such function
        monkeypatch.setattr(evaluation, name, lambda config, *sets: None)
    config, plan = evaluation_of(tmp_path)
    config, (one, two) = replace(config, reward=RewardConfig()), plan.eval_sets
    two = replace(two, custom_generate_function_path="a.b")
    evaluation.check(config, replace(plan, eval_sets=(two,)))
    with pytest.raises(ConfigError, match="evaluation set one: "):
        evaluation.check(config, replace(plan, eval_sets=(two, one)))


TRY_LOCK = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def is_locked(folder: Path) -> bool:
    """Tell whether another process cannot have the folder."""
    return subprocess.run([sys.executable, "-c", TRY_LOCK, str(folder / LOCK)], stderr=subprocess.DEVNULL).returncode != 0


def test_a_folder_that_another_evaluation_has_is_not_marked(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, held: object) -> None:
        raise ConfigError(f"{folder} is in use")

    monkeypatch.setattr(evaluation, "own_results", refuse)
    with pytest.raises(ConfigError, match="is in use"):
        evaluation.evaluate(*evaluation_of(tmp_path, eval_output=tmp_path / "out"))
    assert not started.made and not (tmp_path / "out").exists()


def test_engines_end_and_the_folder_is_free_where_an_evaluation_fails(started: Started, tmp_path: Path) -> None:
    given = evaluation_of(tmp_path, eval_output=tmp_path / "out")
    locked = []

    def fail(engines: str) -> None:
        locked.append(is_locked(tmp_path / "out"))
        raise ValueError("lost")

    started.run = fail
    with pytest.raises(ValueError, match="lost"):
        evaluation.evaluate(*given)
    assert not started.running and not (tmp_path / "out" / "metrics.json").exists()
    assert locked == [True] and not is_locked(tmp_path / "out")
