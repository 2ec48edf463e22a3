"""A tiny model, a few rows of data, and ways to run the command line, shared by the end-to-end tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qwench import cli
from qwench.commands.quickstart import write_data
from tests.verbs import run_verb

REPOSITORY = Path(__file__).parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
DIGITS = {"rm_type": None, "allow_degenerate_rewards": None, "custom_rm_path": "tests.e2e.rewards.digit_share"}
"""A reward that a random model earns some of and can learn to earn more of."""

InProcess = Callable[[Sequence[str]], tuple[int, str]]


@dataclass(frozen=True)
class Workspace:
    """Inputs that every test reads and none writes."""

    model: Path
    sft_data: Path
    train_data: Path
    test_data: Path

    def train_argv(self, save: Path | None, **overrides: object) -> list[str]:
        """Return a small, deterministic GRPO job; `overrides` replace or add flags."""
        flags: dict[str, object] = {
            "hf_checkpoint": self.model, "prompt_data": self.train_data, "input_key": "prompt", "label_key": "label",
            "apply_chat_template": (), "rollout_shuffle": (), "rm_type": "math", "allow_degenerate_rewards": (),
            "num_rollout": 3, "rollout_batch_size": 4, "n_samples_per_prompt": 4, "global_batch_size": 8,
            "rollout_max_response_len": 12, "use_dynamic_batch_size": (), "max_tokens_per_gpu": 256, "lr": 1e-3,
            "lr_decay_style": "constant", "deterministic_mode": (), "save": save, "save_interval": 1, "colocate": (),
        }  # fmt: skip
        return ["train", *as_flags({**flags, **overrides})]

    def sft_argv(self, save: Path, **overrides: object) -> list[str]:
        """Return a small fine-tuning job over the demonstrations in their order; `overrides` replace or add flags."""
        flags: dict[str, object] = {
            "hf_checkpoint": self.model, "prompt_data": self.sft_data, "num_rollout": 3, "rollout_batch_size": 8,
            "global_batch_size": 8, "use_dynamic_batch_size": (), "max_tokens_per_gpu": 256, "lr": 3e-3,
            "lr_decay_style": "constant", "save": save,
        }  # fmt: skip
        return ["sft", *as_flags({**flags, **overrides})]

    def eval_argv(self, model: Path, output: Path, **overrides: object) -> list[str]:
        """Return an evaluation of `model` on the held-out problems; `overrides` replace or add flags."""
        flags: dict[str, object] = {
            "hf_checkpoint": model, "eval_prompt_data": ("held_out", self.test_data), "input_key": "prompt",
            "label_key": "label", "apply_chat_template": (), "rm_type": "math", "eval_max_response_len": 40,
            "eval_output": output,
        }  # fmt: skip
        return ["eval", *as_flags({**flags, **overrides})]


def as_flags(flags: dict[str, object]) -> list[str]:
    """Spell flags as words: None leaves one out, () is a bare flag, a tuple has several values."""
    words = []
    for name, value in flags.items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def read_metrics(save: Path) -> list[dict[str, float]]:
    """Return the records of a run's metrics.jsonl without wall-clock values."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.startswith("perf/")} for record in records]


def column(save: Path, name: str) -> list[float]:
    """Return one metric of a run over its axis."""
    return [record[name] for record in read_metrics(save) if name in record]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute as the child processes do: more threads would add up in another order, and are slower for a tiny model."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_left_of_a_run() -> Iterator[None]:
    """Take back what a run in this process sets for the whole process; tests of other folders come after."""
    environ = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    for name in os.environ.keys() - environ.keys():
        del os.environ[name]
    os.environ.update(environ)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Build the inputs once."""
    folder = tmp_path_factory.mktemp("workspace")
    write_data(folder, seed=0, num_demos=256, num_prompts=40, num_held_out=16)
    run_verb(["make-model", "--size", "tiny", "--output", str(folder / "model"), "--seed", "0"])
    return Workspace(folder / "model", folder / "sft.jsonl", folder / "train.jsonl", folder / "test.jsonl")


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]) -> InProcess:
    """Return a function that runs the command line in this process and gives exit code and standard error."""

    def run(argv: Sequence[str]) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(argv))
        return int(ended.value.code or 0), capsys.readouterr().err

    return run
