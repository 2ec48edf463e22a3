"""Commands that live in processes of their own: several ranks under torchrun, and the server behind a real socket."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch.distributed import run as torchrun
from transformers import AutoModelForCausalLM

from qwench import cli
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.peft import AdapterConfig, write_adapter
from tests.deadlines import patient
from tests.e2e.conftest import Workspace, column
from tests.forked import Finished, Forked, fork_qwench
from tests.verbs import run_verb

START_TIMEOUT_S = patient(60)


def fork_torchrun(folder: Path, words: Sequence[str], *, num_ranks: int) -> Finished:
    """Run `torchrun -m qwench WORDS` on this machine alone, agent and ranks forked."""
    file = folder / "call-of-ranks"
    file.write_bytes(pickle.dumps((cli.main, [words])))
    options = ["--standalone", "--nproc-per-node", str(num_ranks), "-m", "tests.forked_call", str(file)]
    return Forked(folder, torchrun.main, options).end()


def test_two_ranks_have_the_losses_of_one(workspace: Workspace, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_verb(workspace.sft_argv(one))
    finished = fork_torchrun(tmp_path, workspace.sft_argv(two, actor_num_gpus_per_node=2), num_ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for name in ("train/loss", "train/grad_norm"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-5)
    assert len(column(two, "train/loss")) == 3


@pytest.fixture
def server(workspace: Workspace, tmp_path: Path) -> Iterator[str]:
    """Start `qwench serve`, with the newest adapter of a run, give its address when it answers, and end it as Ctrl-C does."""
    adapter = tmp_path / "run" / "iter_0000003"
    adapter.mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    config = AdapterConfig(rank=2, alpha=2.0, use_rslora=False, targets=("q_proj",))
    architecture = architecture_of(load_hf_config(workspace.model))
    write_adapter(adapter, config, {name: torch.zeros(shape) for name, shape in config.shapes(architecture).items()})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = fork_qwench(
        tmp_path, ["serve", "--hf-checkpoint", str(workspace.model), "--port", str(port), "--lora", f"zero={tmp_path / 'run'}"]
    )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.kill(process.pid, signal.SIGINT)
        errors = process.end(timeout_s=START_TIMEOUT_S).stderr
    assert "Traceback" not in errors, errors


def wait_until_healthy(process: Forked, address: str) -> None:
    """Ask until the server answers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=patient(5)).close()
            return
        except (urllib.error.URLError, ConnectionError):
            assert process.runs(), process.end().stderr
            assert time.monotonic() < deadline, "the server did not answer in time"
            time.sleep(0.1)


def test_server_samples_with_the_log_probs_of_transformers(server: str, workspace: Workspace) -> None:
    prompt = [49, 43, 50, 61, 63]
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 16, "temperature": 1.0}, "return_logprob": True}
    body["lora_path"] = "zero"  # an adapter that changes nothing
    request = urllib.request.Request(
        f"{server}/generate", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=patient(60)) as response:
        answer = json.load(response)
    log_probs, sampled = zip(*((entry[0], entry[1]) for entry in answer["meta_info"]["output_token_logprobs"]), strict=True)
    assert 0 < len(sampled) <= 16
    model = AutoModelForCausalLM.from_pretrained(workspace.model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *sampled]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sampled)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(log_probs), expected, atol=1e-4, rtol=0)
