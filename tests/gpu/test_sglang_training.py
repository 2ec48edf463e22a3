"""Qwen3-0.6B's real size on one GPU: a stock SGLang server and an FSDP2 trainer that publishes to it and borrows its memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.training import TrainingConfig
from qwench.engines.client import HttpEngine
from qwench.engines.fleet.servers import ServerProcess
from qwench.engines.kinds.sglang import sglang_command
from qwench.engines.protocol import GenerateRequest, GenerateResult, MemoryTag
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.random_qwen3 import make_checkpoint
from qwench.training.batch import pack
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.process_group import init_process_group
from qwench.weights.plan import PublicationPlan
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress, Placement, gpu_names, host_name
from tests.contract.engine_hosts import ask, generate_all, prompt_of
from tests.fakes.orders import server_order
from tests.fakes.sections import adamw
from tests.fakes.trainer import take_step
from tests.gpu.marks import NEEDS_SGLANG

pytestmark = NEEDS_SGLANG
TOKEN = "secret"
WORDS = ("--mem-fraction-static", "0.4", "--cuda-graph-max-bs", "8", *os.environ.get("SGLANG_TEST_FLAGS", "").split())
"""SGLANG_TEST_FLAGS names kernels that are installed where the defaults are not."""
REQUESTS = [ask(f"r{i}", prompt_of(20 + 7 * i, seed=i), max_new_tokens=64, seed=i, ignore_eos=True) for i in range(8)]
MEAN_GAP = 0.02
Result = TypeVar("Result")


@dataclass
class Scene:
    """Trainer and server of one model's size; the server holds no weights that were published before a test does so."""

    backend: FsdpTrainer
    address: EngineAddress
    folder: Path

    def drive(self, scenario: Callable[[HttpEngine], Awaitable[Result]]) -> Result:
        """Run a scenario against the server."""

        async def run() -> Result:
            engine = HttpEngine(self.address.base_url, token=TOKEN, kind="sglang", placement=self.address.placement)
            try:
                return await scenario(engine)
            finally:
                await engine.close()

        return asyncio.run(run())

    def publish(self, version: int, transport: str) -> None:
        """Bring the trainer's weights to the server, which confirms every tensor."""
        flags = EngineConfig(update_weight_transport=transport)  # type: ignore[arg-type]
        plan = PublicationPlan(engine=flags, model_folder=self.folder, timeout_s=120)
        publish_from_rank(self.backend, [self.address], version, plan)

    def checksums(self) -> dict[str, str]:
        """Return what the server says it holds, tensor by tensor."""

        async def ask_for_them(engine: HttpEngine) -> dict[str, str]:
            answer = await engine.post("/weights_checker", {"action": "checksum"}, timeout_s=60)
            return answer["ranks"][0]["checksums"]

        return self.drive(ask_for_them)

    def mean_gap(self) -> float:
        """Sample, and return the mean difference between the server's log-probs and the trainer's."""
        results = self.drive(lambda engine: generate_all(engine, REQUESTS))
        batch = batch_of(REQUESTS, results)
        scored = self.backend.forward([pack(batch, list(range(len(results))))], temperature=1.0).log_probs[0]
        return float((scored[scored != 0] - torch.cat(batch.rollout_log_probs or [])).abs().mean())


def batch_of(requests: Sequence[GenerateRequest], results: Sequence[GenerateResult]) -> RolloutBatch:
    """Make what the trainer learns from of prompts and responses."""
    return RolloutBatch(
        tokens=[torch.tensor([*asked.input_ids, *got.output_ids]) for asked, got in zip(requests, results, strict=True)],
        loss_mask=[torch.ones(len(got.output_ids), dtype=torch.bool) for got in results],
        rewards=torch.zeros(len(results)),
        graded=torch.ones(len(results), dtype=torch.bool),
        group_ids=torch.zeros(len(results), dtype=torch.int64),
        execution_ids=torch.arange(len(results)),
        rollout_log_probs=[torch.tensor(got.log_probs) for got in results],
    )


def likelihood(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    """Make the responses likelier."""
    return TokenLoss(loss=-log_probs.sum() / micro_batch.loss_mask.sum(), metrics={})


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder, device = tmp_path_factory.mktemp("sglang") / "model", torch.device("cuda", 0)
    make_checkpoint(folder, size="0.6B", tokenizer=build_small_tokenizer(), device=device)
    init_process_group(device, environ={}, timeout_s=120)
    backend = FsdpTrainer.build(
        folder,
        training=TrainingConfig(gradient_checkpointing=True),
        optimizer=adamw(lr=1e-4),
        total_steps=1,
        param_dtype=torch.bfloat16,
        device=device,
        attention="varlen",
    )
    order = server_order(
        folder, folder.parent, token=TOKEN, dtype="bfloat16", releases_memory=True, seed=0, sglang_args=WORDS,
        engine_start_timeout=600.0,
    )  # fmt: skip
    command = sglang_command(order, index=0, gpu_ids=(0,), environ=os.environ)
    process = ServerProcess(command)
    try:
        placement = Placement(host=host_name(), devices=gpu_names([0]))
        address = EngineAddress(base_url=process.start(), token=TOKEN, kind="sglang", placement=placement)
        yield Scene(backend, address, folder)
    finally:
        process.stop()
        dist.destroy_process_group()


def test_cuda_ipc_and_disk_bring_weights_of_equal_checksums(scene: Scene) -> None:
    held = []
    for version, transport in enumerate(("ipc", "disk"), start=1):
        scene.publish(version, transport)
        held.append(scene.checksums())
    assert len(held[0]) > 100 and held[0] == held[1]
    assert scene.mean_gap() < MEAN_GAP


def test_the_server_lends_its_memory_to_a_training_step_and_then_samples_from_the_new_weights(scene: Scene) -> None:
    scene.publish(3, "ipc")
    before, results = scene.checksums(), scene.drive(lambda engine: generate_all(engine, REQUESTS))
    batch = pack(batch_of(REQUESTS, results), list(range(len(results))))
    free = [torch.cuda.mem_get_info()[0]]
    scene.drive(lambda engine: engine.sleep([MemoryTag.KV_CACHE, MemoryTag.WEIGHTS]))
    free.append(torch.cuda.mem_get_info()[0])
    steps = [take_step(scene.backend, [batch], likelihood, temperature=1.0, with_entropy=False) for _ in range(2)]
    scene.drive(lambda engine: engine.wake([MemoryTag.WEIGHTS]))
    scene.publish(4, "ipc")
    scene.drive(lambda engine: engine.wake([MemoryTag.KV_CACHE]))
    assert free[1] - free[0] > 20 * 2**30, "cache and weights of --mem-fraction-static 0.4"
    assert steps[1].loss < steps[0].loss
    after = scene.checksums()
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in before if "proj" in name)
    assert scene.mean_gap() < MEAN_GAP
