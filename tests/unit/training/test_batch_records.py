"""What --save-debug-train-data writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.observability.dumps import run_of
from qwench.training.batch import save_batch


def test_a_line_for_each_sample_has_its_columns(tmp_path: Path) -> None:
    batch = RolloutBatch(
        tokens=[torch.tensor([1, 2, 3]), torch.tensor([4, 5])],
        loss_mask=[torch.tensor([True, False]), torch.tensor([True])],
        rewards=torch.tensor([1.0, float("nan")]),
        graded=torch.tensor([True, False]),
        group_ids=torch.tensor([0, 0]),
        execution_ids=torch.tensor([8, 9]),
        old_log_probs=[torch.tensor([-0.5, 0.0]), torch.tensor([-0.25])],
    )
    save_batch(str(tmp_path / "{rollout_id:03d}.jsonl"), 7, batch, run="/runs/a")
    header, *samples = [json.loads(line) for line in (tmp_path / "007.jsonl").read_text().splitlines()]
    assert header == {"rollout_id": 7, "run": "/runs/a"} and run_of(tmp_path / "007.jsonl") == "/runs/a"
    assert samples == [
        {"tokens": [1, 2, 3], "loss_mask": [True, False], "rewards": 1.0, "graded": True, "group_ids": 0,
         "execution_ids": 8, "old_log_probs": [-0.5, 0.0]},
        {"tokens": [4, 5], "loss_mask": [True], "rewards": None, "graded": False, "group_ids": 0,
         "execution_ids": 9, "old_log_probs": [-0.25]},
    ]  # fmt: skip
