"""Adapters that publications bring to a stock SGLang server, under a name of each version; Qwen3-0.6B's shape."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwench.cluster.gpus import DedicatedGpus
from qwench.config.sections.engine import EngineConfig
from qwench.engines.client import HttpEngine
from qwench.engines.fleet.event_loop import EventLoopThread
from qwench.engines.fleet.pool import EnginePool
from qwench.engines.fleet.servers import ServerProcess
from qwench.engines.kinds.sglang import sglang_command
from qwench.engines.protocol import GenerateRequest, GenerateResult
from qwench.models.architecture import PROJECTIONS
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.hf import architecture_of
from qwench.models.peft import AdapterConfig
from qwench.models.random_qwen3 import make_checkpoint
from qwench.observability.timing import PhaseTimer
from qwench.weights.plan import NamedAdapter, PublicationPlan
from qwench.weights.publisher import Publisher
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress, Placement, gpu_names, host_name
from qwench.wire.portions import WeightBucket
from tests.contract.engine_hosts import ask, prompt_of
from tests.fakes.orders import server_order
from tests.gpu.marks import NEEDS_SGLANG

pytestmark = NEEDS_SGLANG
TOKEN = "secret"
WORDS = ("--mem-fraction-static", "0.3", "--cuda-graph-max-bs", "8", *os.environ.get("SGLANG_TEST_FLAGS", "").split())
"""SGLANG_TEST_FLAGS names kernels that are installed where the defaults are not."""
CONFIG = AdapterConfig(rank=8, alpha=16.0, use_rslora=False, targets=tuple(PROJECTIONS))
MEAN_GAP = 0.02
"""Of log-probs in bfloat16 from those in float32; an adapter moves them by more than five times as much."""


class Trained:
    """A trained model, whose adapter is published."""

    matrices: Mapping[str, Tensor]

    def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[WeightBucket]:
        assert part == "adapter"
        yield [*self.matrices.items(), ("lora_scale", torch.tensor([CONFIG.scale]))]

    def shared_weights(self, part: str = "merged") -> None:
        return None

    def publish(self, addresses: Sequence[EngineAddress], version: int, plan: PublicationPlan) -> None:
        publish_from_rank(self, addresses, version, plan)


def draw_matrices(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = CONFIG.shapes(architecture_of(model.config))
    return {name: (torch.randn(shape, generator=draw) * 0.03).bfloat16().float() for name, shape in shapes.items()}


def log_probs_with(
    model: PreTrainedModel, matrices: Mapping[str, Tensor], request: GenerateRequest, result: GenerateResult
) -> Tensor:
    """Return the log-probs [R] of the response by the float32 module with W + scale * B A in the place of W."""
    changes = {
        module: CONFIG.scale * matrices[f"{name}.lora_B.weight"].to(module.weight.device) @ a.to(module.weight.device)
        for name, module in model.named_modules()
        if (a := matrices.get(f"{name}.lora_A.weight")) is not None
    }
    tokens = torch.tensor([[*request.input_ids, *result.output_ids]], device=model.device)
    start = len(request.input_ids)
    with torch.no_grad():
        for module, change in changes.items():
            module.weight += change
        logits = model(tokens).logits[0, start - 1 : -1].log_softmax(-1)
        for module, change in changes.items():
            module.weight -= change
    return logits.gather(-1, tokens[0, start:, None]).squeeze(-1).cpu()


def test_each_version_of_an_adapter_is_loaded_named_and_unloaded(tmp_path: Path):
    folder = tmp_path / "model"
    make_checkpoint(folder, size="0.6B", tokenizer=build_small_tokenizer(), device=torch.device("cuda", 0))
    order = server_order(
        folder, tmp_path, token=TOKEN, dtype="bfloat16", seed=0, serves_checkpoint=True, adapter=CONFIG, sglang_args=WORDS,
        engine_start_timeout=600.0,
    )  # fmt: skip
    process = ServerProcess(sglang_command(order, index=0, gpu_ids=(0,), environ=os.environ))
    try:
        placement = Placement(host=host_name(), devices=gpu_names([0]))
        client = HttpEngine(process.start(), token=TOKEN, kind="sglang", placement=placement)
        pool, trained = EnginePool([client], EventLoopThread()), Trained()
        plan = PublicationPlan(engine=EngineConfig(), adapters=True, named=NamedAdapter(config=CONFIG), timeout_s=120)
        publisher = Publisher(trained, pool, plan, gpus=DedicatedGpus(weights_may_alias=False), timer=PhaseTimer())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().cuda()
        request = ask("one", prompt_of(40), max_new_tokens=64, ignore_eos=True)
        for version in (4, 5, 6):
            trained.matrices = matrices = draw_matrices(model, seed=version)
            publisher.publish(version=version)
            result = pool.run(pool.generate(request), label="generate", timeout_s=120)
            assert result.weight_versions == [version] * 64
            expected = log_probs_with(model, matrices, request, result)
            measured = torch.tensor(result.log_probs)
            assert (measured - expected).abs().mean() < MEAN_GAP
            without = log_probs_with(model, {}, request, result)
            assert (measured - without).abs().mean() > 5 * MEAN_GAP
        publisher.forget_adapters()
        pool.close()
    finally:
        process.stop()
