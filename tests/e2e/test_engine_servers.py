"""Rollouts from engines in processes of their own: routed, killed while they generate, and started again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwench.config.parse import parse_train
from qwench.data.prompts import PromptSource
from qwench.engines.pool import EnginePool
from qwench.engines.servers import ServerProcess
from qwench.launch.engines import command_makers
from qwench.launch.generation import Generation, build_generation
from qwench.launch.inputs import read_inputs, read_training_prompts
from qwench.samples import Rollout, Sample
from tests.e2e.conftest import ONE_THREAD, Workspace

TOKEN = "secret"
DEADLINE_S = 90.0
NUM_PROMPTS, SIBLINGS = 10, 3
RESPONSE_LEN = 160
WATCHED = {
    "use_fault_tolerance": (), "rollout_health_check_interval": 1, "rollout_health_check_timeout": 10,
    "engine_start_timeout": DEADLINE_S,
}  # fmt: skip


@dataclass
class Scene:
    """Two servers, the pool over them, and a stream of rollouts."""

    generation: Generation
    servers: Sequence[ServerProcess]
    source: PromptSource

    @property
    def pool(self) -> EnginePool:
        return self.generation.engines

    def publish(self, model: PreTrainedModel, version: int) -> None:
        """Bring a model's weights to both engines over their sockets."""
        bucket = [(name, parameter.detach()) for name, parameter in model.named_parameters()]

        def send() -> None:
            for engine in self.pool.engines:
                self.pool.run(engine.update_weights([bucket], version=version), label="send", timeout_s=DEADLINE_S)

        self.pool.publish(send, version=version)


@pytest.fixture(params=[True, False], ids=["router", "least loaded"])
def scene(request: pytest.FixtureRequest, workspace: Workspace, tmp_path: Path) -> Iterator[Scene]:
    flags = {**WATCHED, "use_sglang_router": () if request.param else None, "deterministic_mode": None, "num_rollout": 2,
             "rollout_batch_size": NUM_PROMPTS, "n_samples_per_prompt": SIBLINGS, "global_batch_size": NUM_PROMPTS * SIBLINGS,
             "rollout_max_response_len": RESPONSE_LEN, "max_tokens_per_gpu": 4096}  # fmt: skip
    inputs = read_inputs(parse_train(workspace.train_argv(tmp_path / "run", **flags)[1:]))
    makers = command_makers(inputs, num_engines=2, token=TOKEN, with_weights=False)
    servers = [ServerProcess(make(gpu_ids=(), environ=ONE_THREAD, host="127.0.0.1")) for make in makers]
    source = PromptSource(read_training_prompts(inputs).prompts, n_samples_per_prompt=SIBLINGS, shuffle=False, seed=0)
    generation = build_generation(inputs, with_weights=False, servers=servers, token=TOKEN)
    try:
        yield Scene(generation, servers, source)
    finally:
        generation.close()
    assert not any(server.is_running() for server in servers)


@pytest.fixture(scope="module")
def models(workspace: Workspace) -> list[PreTrainedModel]:
    """Return the model with the weights of versions 1 and 2, which no checkpoint holds."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(workspace.model, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        models.append(model.eval())
    return models


def kill_while_it_generates(scene: Scene, victim: int, generated: threading.Event) -> None:
    """SIGKILL a server's processes as soon as it has sampled some tokens of unfinished responses."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        stats = scene.pool.run(scene.pool.engines[victim].stats(), label="stats", timeout_s=DEADLINE_S)
        if stats.generated_tokens > 20 and stats.num_running > 0:
            break
        assert time.monotonic() < deadline and not generated.is_set(), f"never caught generating: {stats}"
        time.sleep(0.005)
    group = scene.servers[victim].process_group
    assert group is not None
    os.killpg(group, signal.SIGKILL)


def check_rollout(rollout: Rollout, model: PreTrainedModel, *, version: int) -> None:
    """Every prompt has its group, no sample is there twice, and every token was sampled by these weights."""
    assert len(rollout.groups) == NUM_PROMPTS
    assert len({group.group_id for group in rollout.groups}) == NUM_PROMPTS
    assert [len(group.samples) for group in rollout.groups] == [SIBLINGS] * NUM_PROMPTS
    assert len({sample.sample_id for sample in rollout.samples}) == NUM_PROMPTS * SIBLINGS
    assert {one for sample in rollout.samples for one in sample.weight_versions} == {version}
    for sample in rollout.samples:
        expected = log_probs(model, sample)
        torch.testing.assert_close(torch.tensor(sample.rollout_log_probs), expected, atol=2e-4, rtol=0)


def log_probs(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    """Return the log-probs of a response under Hugging Face's own forward pass."""
    tokens = torch.tensor([sample.tokens])
    start = len(sample.tokens) - sample.response_length
    with torch.no_grad():
        logits = model(tokens).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[0, start:, None])[:, 0]


def test_a_rollout_survives_the_death_of_a_server_which_comes_back_with_current_weights(
    scene: Scene, models: list[PreTrainedModel]
) -> None:
    stream = scene.generation.stream(scene.source, num_rollouts=2)
    scene.publish(models[0], version=1)
    generated = threading.Event()
    with ThreadPoolExecutor() as threads:
        taken = threads.submit(stream.take, 0)
        taken.add_done_callback(lambda _: generated.set())
        kill_while_it_generates(scene, 0, generated)
        first = taken.result(DEADLINE_S)
    check_rollout(first, models[0], version=1)

    scene.publish(models[1], version=2)
    assert scene.pool.num_restarts == 1
    assert all(server.is_running() for server in scene.servers)
    before = [scene.pool.run(engine.stats(), label="stats", timeout_s=DEADLINE_S) for engine in scene.pool.engines]
    check_rollout(stream.take(1), models[1], version=2)
    after = [scene.pool.run(engine.stats(), label="stats", timeout_s=DEADLINE_S) for engine in scene.pool.engines]
    assert all(late.generated_tokens > early.generated_tokens for early, late in zip(before, after, strict=True))
    stream.close()
