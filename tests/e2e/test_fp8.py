"""FP8 rollouts with training of plain weights, from a converted checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwench.models.hf import load_model
from tests.contract.test_fp8_engine import by_hand
from tests.e2e.conftest import DIGITS, InProcess, Workspace, column
from tests.verbs import run_verb


@pytest.fixture(scope="module")
def fp8_model(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fp8") / "model"
    run_verb(["convert", "--input", str(workspace.model), "--output", str(output), "--to", "fp8"])
    return output


def test_rollouts_come_from_the_quantized_form_of_what_was_trained(
    workspace: Workspace, fp8_model: Path, in_process: InProcess, tmp_path: Path
) -> None:
    argv = workspace.train_argv(
        tmp_path / "run",
        hf_checkpoint=fp8_model,
        num_rollout=2,
        save_hf=tmp_path / "hf_{rollout_id}",
        save_debug_rollout_data=tmp_path / "rollout_{rollout_id}.jsonl",
        **DIGITS,
    )
    assert in_process(argv)[0] == 0
    (gap,) = column(tmp_path / "run", "probe/fp8_logprob_abs_diff")
    assert 0 < gap < 0.2
    trained = load_model(tmp_path / "hf_0", dtype=torch.float32)  # a plain checkpoint again
    sampled_from = by_hand(trained)
    records = [json.loads(line) for line in (tmp_path / "rollout_1.jsonl").read_text().splitlines()]
    samples = [record for record in records if "tokens" in record]
    assert len(samples) == 16
    for sample in samples:
        assert set(sample["weight_versions"]) == {1}
        sampled = torch.tensor(sample["rollout_log_probs"])
        torch.testing.assert_close(response_log_probs(sampled_from, sample), sampled, atol=1e-4, rtol=0)
        assert not torch.allclose(response_log_probs(trained, sample), sampled, atol=1e-3)


def response_log_probs(model: torch.nn.Module, sample: dict) -> torch.Tensor:
    tokens = torch.tensor([sample["tokens"]])
    with torch.no_grad():
        scored = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])
    return scored[-sample["response_length"] :, 0]


def test_plain_training_has_no_probe(workspace: Workspace, in_process: InProcess, tmp_path: Path) -> None:
    assert in_process(workspace.train_argv(tmp_path / "run", num_rollout=1, **DIGITS))[0] == 0
    assert column(tmp_path / "run", "probe/fp8_logprob_abs_diff") == []
