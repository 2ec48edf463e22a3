"""The commands of every example parse, and none of them is warned about; what a script of an example computes is right."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwench.config.advice import warnings
from qwench.config.command_line.parse import parse_flags, parse_run
from qwench.config.sections.verbs import MakeModelConfig
from qwench.samples import Prompt, Sample

EXAMPLES = Path(__file__).parents[2] / "examples"

RECORDER = """\
#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps(words) + "\\n")
left = {{"--output": ("config.json", "{{}}"), "--save-hf": ("config.json", "{{}}")}}
for flag, (name, content) in left.items():
    if flag in words:
        folder = pathlib.Path(words[words.index(flag) + 1])
        folder.mkdir(parents=True)
        (folder / name).write_text(content)
"""
"""Stands in for qwench: keeps the words it was called with and leaves the files that later stages read."""

SCRIPTS = {
    "multi_turn": [],
    "qwen3_0.6b_one_gpu": [],
    "smollm2_gsm8k": ["eval_base", "sft", "eval_sft", "grpo", "eval_grpo"],  # not its conversion of a download
    "word_problems": [],
}


def commands_of(example: str, folder: Path) -> list[list[str]]:
    """Run an example's script with a stand-in for qwench, and return what it called it with."""
    qwench = folder / "bin" / "qwench"
    qwench.parent.mkdir()
    qwench.write_text(RECORDER.format(python=sys.executable))
    qwench.chmod(0o755)
    (folder / "data").mkdir()
    for name in ("gsm8k-train.jsonl", "gsm8k-test.jsonl", "gsm8k-sft.parquet"):
        (folder / "data" / name).touch()
    variables = {"OUTPUT_DIR": "out", "DATA_DIR": "data", "QWEN_TIKTOKEN": "none", "RECORD": "record"}
    if example == "smollm2_gsm8k":
        variables |= {"MODEL_DIR": "smollm2", "GGUF": "none"}
        (folder / "smollm2").mkdir()
        (folder / "smollm2" / "config.json").write_text("{}")
    command = ["bash", str(EXAMPLES / example / "run.sh"), *SCRIPTS[example]]
    path = f"{qwench.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in (folder / "record").read_text().splitlines()]


def test_every_example_is_tested():
    assert {script.parent.name for script in EXAMPLES.glob("*/run.sh")} == SCRIPTS.keys()


@pytest.mark.parametrize("example", SCRIPTS)
def test_the_commands_of_an_example_parse_and_mean_what_they_say(example, tmp_path, monkeypatch):
    commands = commands_of(example, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert commands
    for verb, *words in commands:
        if verb == "make-model":
            parse_flags(MakeModelConfig, words, prog="qwench make-model")
        else:
            config = parse_run(verb, words)
            assert list(warnings(config, trains=verb != "eval")) == []


@pytest.fixture
def smollm2(monkeypatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLES / "smollm2_gsm8k")
    modules = {name: importlib.import_module(name) for name in ("steps_reward", "make_data", "plot")}
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    return modules


@pytest.mark.parametrize(
    ("response", "steps", "expected"),
    [
        ("48/2 = 24 in May, 48+24 = $72 in all. \\boxed{72}", [24.0, 72.0], 1.0),
        ("48/2 = 24 in May, 24+24 = 48 in all. \\boxed{48}", [24.0, 72.0], 0.25),
        ("48/2 = 23, 48+24 = 72. \\boxed{72}", [24.0, 72.0], 0.5),  # nothing counts behind a wrong step
        ("48/2 = 24, again 48/2 = 24. \\boxed{5}", [24.0, 72.0], 0.25),  # a step counts once
        ("48/2 = 24, 48+24 = 72.", [24.0, 72.0], 0.0),
        ("3*400 = 1,200, 1,200*.5 = 600.0, 5-8 = -3 \\boxed{-3}", [1200.0, 600.0, -3.0, 7.0], 0.875),
        ("It is \\boxed{72}.", None, 1.0),
        ("48/2 = 24. \\boxed{24}", [], 0.0),
    ],
)
def test_steps_are_half_of_a_worked_solutions_reward(smollm2, response: str, steps: list[float] | None, expected: float):
    metadata = {} if steps is None else {"steps": steps}
    label = "-3" if "-3" in response else "72"
    judged = Sample(prompt=Prompt(text="", token_ids=(), label=label, metadata=metadata), sample_id=0, group_id=0)
    judged.response = response
    assert smollm2["steps_reward"].score(judged).score == expected


def test_the_data_of_smollm2_are_written_from_the_published_rows(smollm2, tmp_path: Path):
    worked = "He sold 48/2 = <<48/2=24>>24 clips.\nThat is 1,000+24 = $<<1000+24=1024>>1,024.\n#### 1,024"
    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    for split in ("train", "test"):
        table = pa.table({"question": [f"How many in {split}?"], "answer": [worked]})
        pq.write_table(table, tmp_path / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet")
    smollm2["make_data"].write(tmp_path)
    train, test = (json.loads((tmp_path / f"gsm8k-{split}.jsonl").read_text()) for split in ("train", "test"))
    question = train["prompt"][0]["content"]
    assert question.endswith("\\boxed{}.\n\nHow many in train?")
    assert train == {"prompt": [{"role": "user", "content": question}], "label": "1024", "metadata": {"steps": [24.0, 1024.0]}}
    assert test == {"prompt": [{"role": "user", "content": question.replace("train", "test")}], "label": "1024"}
    (row,) = pq.read_table(tmp_path / "gsm8k-sft.parquet").to_pylist()
    solution = "He sold 48/2 = 24 clips.\nThat is 1,000+24 = $1,024.\n\nThe answer is \\boxed{1024}."
    assert row["messages"] == [*train["prompt"], {"role": "assistant", "content": solution}]


def test_results_of_smollm2_are_those_of_the_stages_that_ran(smollm2, tmp_path: Path, monkeypatch, capsys):
    def evaluate(stage: str, way: str, rewards: list[list[float]]) -> None:
        (tmp_path / f"eval-{stage}-{way}").mkdir()
        rows = [{"group_id": group, "reward": reward} for group, of_group in enumerate(rewards) for reward in of_group]
        (tmp_path / f"eval-{stage}-{way}" / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="the stage eval_grpo comes first"):
        smollm2["plot"].main()
    for stage, metrics in (
        ("sft", [{"train/step": 0, "train/loss": 1.0}]),
        ("grpo", [{"rollout/step": 0, "rollout/raw_reward": 0.5}]),
    ):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    evaluate("grpo", "greedy", [[1.0], [0.0]])
    evaluate("grpo", "sampled", [[1.0, 1.0], [1.0, 0.0]])
    smollm2["plot"].main()
    after = "| after GRPO | 50.00 +- 50.00 % | 75.00 +- 25.00 % |"
    assert after in capsys.readouterr().out and (tmp_path / "curves.png").is_file()
    evaluate("sft", "greedy", [[0.0], [0.0]])
    smollm2["plot"].main()
    assert (tmp_path / "results.md").read_text().splitlines()[2:] == [
        "| after SFT | 0.00 +- 0.00 % | - |",
        after,
        "",
        "GRPO over SFT, greedy, 1 answer: +50.00 points, 1.0 times the standard error of the difference.",
    ]
