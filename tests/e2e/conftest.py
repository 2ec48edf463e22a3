"""A tiny model, a few rows of data, and ways to run the command line, shared by the end-to-end tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwench.quickstart import write_data

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Workspace:
    """Inputs that every test reads and none writes."""

    model: Path
    sft_data: Path
    train_data: Path
    test_data: Path

    def train_argv(self, save: Path, **overrides: object) -> list[str]:
        """Return a small, deterministic GRPO job; `overrides` replace or add flags (None drops one, () is a bare flag)."""
        flags: dict[str, object] = {
            "hf_checkpoint": self.model, "prompt_data": self.train_data, "input_key": "prompt", "label_key": "label",
            "apply_chat_template": (), "rollout_shuffle": (), "rm_type": "math", "allow_degenerate_rewards": (),
            "num_rollout": 3, "rollout_batch_size": 4, "n_samples_per_prompt": 4, "global_batch_size": 8,
            "rollout_max_response_len": 12, "use_dynamic_batch_size": (), "max_tokens_per_gpu": 256, "lr": 1e-3,
            "lr_decay_style": "constant", "deterministic_mode": (), "save": save, "save_interval": 1, "colocate": (),
        }  # fmt: skip
        flags.update(overrides)
        argv = ["train"]
        for name, value in flags.items():
            if value is not None:
                values = value if isinstance(value, tuple) else (value,)
                argv += ["--" + name.replace("_", "-"), *map(str, values)]
        return argv


def run_python(arguments: Sequence[str], *, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with `arguments` from the repository's root."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout_s, cwd=REPOSITORY,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)  # fmt: skip


def run_qwench(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `qwench argv`; a failure shows its output."""
    finished = run_python(["-m", "qwench", *argv])
    assert finished.returncode == 0, f"qwench {' '.join(argv)}\n{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
    return finished


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the records of a metrics.jsonl without wall-clock values."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.startswith("perf/")} for record in records]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Build the inputs once."""
    folder = tmp_path_factory.mktemp("workspace")
    write_data(folder, seed=0, num_demos=64, num_prompts=40, num_held_out=16)
    run_qwench(["make-model", "--size", "tiny", "--output", str(folder / "model"), "--seed", "0"])
    return Workspace(folder / "model", folder / "sft.jsonl", folder / "train.jsonl", folder / "test.jsonl")


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], tuple[int, str]]:
    """Return a function that runs the command line in this process and gives exit code and standard error."""
    from qwench.cli import main  # noqa: PLC0415  (imported late so that collecting the tests stays quick)

    def run(argv: Sequence[str]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(argv))
        return int(ended.value.code or 0), capsys.readouterr().err

    return run
