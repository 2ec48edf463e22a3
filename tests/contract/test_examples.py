"""The commands of every example parse, and none of them is warned about."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwench.config.advice import warnings
from qwench.config.command_line.parse import parse_flags, parse_run
from qwench.config.sections.verbs import MakeModelConfig

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
