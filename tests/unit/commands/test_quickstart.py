import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from qwench.commands import quickstart
from qwench.commands.quickstart import commands, tour, write_data
from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.sections.verbs import MakeModelConfig
from qwench.errors import QwenchError, Stopped
from qwench.observability.stopping import ended_by_signals


class Stages:
    """Runs no command, and leaves what a finished stage leaves."""

    def __init__(self, folder):
        self.folder = folder
        self.verbs = []
        self.stop = None
        self.sizes = {}

    def write(self, folder, *, seed, **sizes):
        self.sizes = {"seed": seed, **sizes}
        write_data(folder, seed=seed, num_demos=2, num_prompts=2, num_held_out=2)

    def plot(self, metrics, file, names):
        assert (metrics, names) == (self.folder / "grpo" / "metrics.jsonl", ["rollout/raw_reward", "eval/held_out"])
        return file

    def run(self, arguments):
        if len(self.verbs) == self.stop:
            raise KeyboardInterrupt
        self.verbs.append(arguments[0])
        result = next(result for _, words, result in commands(self.folder, seed=0) if words == list(arguments))
        if result.suffix == ".json":
            result.parent.mkdir(parents=True)
            result.write_text(json.dumps({"eval/held_out": 0.25 if "before" in str(result) else 0.75}))
        else:
            result.mkdir()


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Return the stages of a tour in a folder that is not there yet."""
    stages = Stages(tmp_path / "q")
    monkeypatch.setattr(quickstart, "run_command", stages.run)
    monkeypatch.setattr(quickstart, "plot_curves", stages.plot)
    monkeypatch.setattr(quickstart, "write_data", stages.write)
    return stages


def test_every_stage_runs_once_in_order_and_a_finished_tour_runs_none(ran, capsys):
    tour(ran.folder, seed=0)
    assert ran.verbs == ["make-model", "sft", "eval", "train", "eval"]
    tour(ran.folder, seed=0)
    assert ran.verbs == ["make-model", "sft", "eval", "train", "eval"]
    said = capsys.readouterr().out
    assert said.count("done already") == 5
    told = re.findall(r"\n== (\d of \d): (.*)\n\$ qwench (\S+)", said)
    assert told[:5] == told[5:] == [
        ("1 of 5", "A tiny Qwen3 with random weights", "make-model"), ("2 of 5", "Fine-tuning on demonstrations", "sft"),
        ("3 of 5", "Held-out accuracy before GRPO", "eval"), ("4 of 5", "GRPO with the deepscaler reward", "train"),
        ("5 of 5", "Held-out accuracy after GRPO", "eval"),
    ]  # fmt: skip
    assert len(re.findall(r"\nheld-out accuracy: 0\.250 after fine-tuning, 0\.750 after GRPO; \d+ s in all\n", said)) == 2
    assert said.endswith(
        f"curves      {ran.folder}/curves.png\nmetrics     {ran.folder}/grpo/metrics.jsonl\n"
        f"checkpoint  {ran.folder}/grpo\nHF export   {ran.folder}/grpo-hf\n"
    )
    assert ran.sizes == {"seed": 0, "num_demos": 360 * 64, "num_prompts": 4000, "num_held_out": 256}  # one epoch of fine-tuning


def test_every_command_is_accepted_by_its_verb(tmp_path):
    kinds = {"make-model": MakeModelConfig, "sft": Config, "train": Config, "eval": Config}
    write_data(tmp_path / "data", seed=3, num_demos=1, num_prompts=1, num_held_out=1)
    for _, (verb, *words), _ in commands(tmp_path, seed=3):
        config = parse_flags(kinds[verb], words, prog=f"qwench {verb}")
        if verb != "make-model":
            data, sets = config.data, config.evaluation.eval_prompt_data
            assert sets == (() if verb == "sft" else ("held_out", f"{tmp_path}/data/test.jsonl"))
            row = json.loads(Path(sets[1] if verb == "eval" else data.prompt_data).read_text())
            assert row.keys() == ({"messages"} if verb == "sft" else {data.input_key, data.label_key})
            assert data.input_key in row


def test_a_stage_starts_from_what_the_one_before_has_left_and_the_tour_owns_all_of_it(tmp_path):
    stages, written = commands(tmp_path, seed=3), tmp_path / "data" / "sft.jsonl"
    after = {"--output", "--save", "--save-hf", "--eval-output"}
    there = {written, *(written.with_stem(name) for name in ("train", "test"))}
    for _, words, result in stages:
        named = {(before, Path(word)) for before, word in pairwise(words) if word.startswith(str(tmp_path))}
        assert {path for flag, path in named if flag not in after} <= there
        there |= {path for flag, path in named if flag in after}
        assert result in there or result.parent in there
    assert {path.relative_to(tmp_path).parts[0] for path in there} | {"curves.png"} == quickstart._ENTRIES
    assert stages[0][1][-2:] == ["--seed", "3"]


@pytest.mark.parametrize("stop", range(5))
def test_an_interrupted_tour_goes_on_with_the_stage_that_was_not_finished(ran, stop):
    ran.stop = stop
    with pytest.raises(KeyboardInterrupt):
        tour(ran.folder, seed=0)
    ran.stop = None
    tour(ran.folder, seed=0)
    assert ran.verbs == ["make-model", "sft", "eval", "train", "eval"]


def test_an_empty_data_folder_is_filled(ran):
    (ran.folder / "data").mkdir(parents=True)
    tour(ran.folder, seed=0)
    assert sorted(path.name for path in (ran.folder / "data").iterdir()) == ["sft.jsonl", "test.jsonl", "train.jsonl"]


def steps_of(question):
    """Return the values after each step of a sum of digits that a question asks for, the first one first."""
    assert re.fullmatch(r"\d([+-]\d)+=\?", question)
    return list(itertools.accumulate(map(int, re.findall(r"[+-]?\d", question))))


def test_problems_go_from_digit_to_digit_and_demonstrations_think_or_guess(tmp_path):
    write_data(tmp_path, seed=1, num_demos=60, num_prompts=30, num_held_out=5)
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    assert {name: len(some) for name, some in rows.items()} == {"sft": 60, "train": 30, "test": 5}
    asked = {}
    for name in ("train", "test"):
        asked[name] = [row["prompt"][0]["content"] for row in rows[name]]
        for row, question in zip(rows[name], asked[name], strict=True):
            values = steps_of(question)
            assert set(values) <= set(range(10)) and all(a != b for a, b in pairwise(values))
            assert (row["label"], row["prompt"][0]["role"]) == (str(values[-1]), "user")
    assert len(set(asked["test"])) == 5 and not set(asked["test"]) & set(asked["train"])
    assert {len(steps_of(question)) for question in asked["train"] + asked["test"]} == {5}
    assert asked["test"] == sorted(asked["test"], key=lambda question: [int(term) for term in re.findall(r"[+-]?\d", question)])

    thinking, first, guesses = 0, set(), set()
    assert {len(steps_of(row["messages"][0]["content"])) for row in rows["sft"]} == {2, 3, 4, 5}
    for user, assistant in (row["messages"] for row in rows["sft"]):
        values, lines = steps_of(user["content"]), re.findall(r"(.+)=(.+)", assistant["content"])
        thinking += bool(lines)
        assert [(eval(left), int(right)) for left, right in lines] == [(value, value) for value in values[1:]][: len(lines)]
        boxed = int(re.fullmatch(r"<think>\n[^<]*\n</think>\n\n\\boxed\{(\d)\}", assistant["content"])[1])
        assert not lines or (boxed == values[-1] and len(lines) == len(values) - 1)
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        first.add(values[0])
        guesses |= set() if lines else {boxed}
    assert 20 < thinking < 40
    assert first == guesses == set(range(10))
    for seed, is_same in ((1, True), (2, False)):
        write_data(tmp_path / str(seed), seed=seed, num_demos=60, num_prompts=30, num_held_out=5)
        assert ((tmp_path / str(seed) / "sft.jsonl").read_bytes() == (tmp_path / "sft.jsonl").read_bytes()) == is_same


def test_files_of_others_and_another_seed_are_refused(ran):
    ran.folder.touch()
    with pytest.raises(QwenchError, match=r"q exists already and is not a quickstart's \(a file\); name another folder"):
        tour(ran.folder, seed=0)
    ran.folder.unlink()
    ran.folder.mkdir()
    (ran.folder / "thesis.tex").touch()
    with pytest.raises(QwenchError, match=r"is not a quickstart's \(thesis.tex\)"):
        tour(ran.folder, seed=0)
    (ran.folder / "thesis.tex").unlink()
    for name in "hgfedcba":
        (ran.folder / name).touch()
    with pytest.raises(QwenchError, match=r"is not a quickstart's \(a, b, c\); name another folder with --output"):
        tour(ran.folder, seed=0)
    for name in "hgfedcba":
        (ran.folder / name).unlink()
    tour(ran.folder, seed=0)
    with pytest.raises(QwenchError, match="a quickstart of another seed"):
        tour(ran.folder, seed=1)


def test_the_verb_gives_its_folder_and_seed_to_the_tour(monkeypatch):
    told = []
    monkeypatch.setattr(quickstart, "tour", lambda folder, *, seed: told.append((folder, seed)))
    quickstart.run(["--output", "o", "--seed", "7"])
    assert told == [(Path("o"), 7)]


def test_a_command_is_a_process_of_this_python_and_its_failure_ends_the_tour(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "words"}\nexit $5\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    quickstart.run_command(["sft", "0"])
    assert (tmp_path / "words").read_text() == "-P -m qwench sft 0\n"
    with pytest.raises(QwenchError, match=r"^`qwench sft 3` ended with exit code 3; see its message above"):
        quickstart.run_command(["sft", "3"])


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    return request.param


@pytest.fixture
def began(number, monkeypatch, tmp_path):
    """A file that the command writes when it runs; on the signal it saves and ends."""
    script, began = tmp_path / "command", tmp_path / "began"
    saving = f"sleep 0.3; touch {tmp_path / 'saved'}; exit 130"
    script.write_text(f"#!/bin/sh\ntrap '{saving}' {number.name[3:]}\ntouch {began}\nwhile :; do sleep 0.02; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return began


def interrupt(began, number):
    while not began.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def test_a_signal_is_passed_on_and_what_the_command_saves_then_is_waited_for(number, began):
    threading.Thread(target=interrupt, args=(began, number), daemon=True).start()
    with ended_by_signals(), pytest.raises(Stopped, match="goes on from here") as stopped:
        quickstart.run_command(["sft"])
    assert stopped.value.number == number
    assert (began.parent / "saved").exists()


def test_a_signal_while_a_command_starts_is_passed_on_too(number, began, monkeypatch):
    def start(*arguments):
        command = popen(*arguments)
        interrupt(began, number)
        return command

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    with ended_by_signals(), pytest.raises(Stopped, match="goes on from here") as stopped:
        quickstart.run_command(["sft"])
    assert stopped.value.number == number
    assert (began.parent / "saved").exists()
