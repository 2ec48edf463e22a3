"""An embedded engine of two GPUs beside one of one."""

from __future__ import annotations

import asyncio

import pytest
import torch

from qwench.engines.protocol import MemoryTag
from tests.contract.engine_hosts import ask, generate_all, make_engine, make_model, prompt_of

pytestmark = [pytest.mark.gpu(2), pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_two_gpus_sample_the_tokens_of_one(cuda_graphs):
    model = make_model("llama")
    requests = [
        ask(f"r{i}", prompt_of(3 + 7 * i, seed=i), seed=i, ignore_eos=True, temperature=0.3 * i, top_k=9 * (i % 2))
        for i in range(6)
    ]

    async def scenario(num_devices: int):
        engine = make_engine(
            model, num_devices=num_devices, device="cuda", dtype=torch.float32, cuda_graphs=cuda_graphs, prefix_cache=False
        )
        results = await generate_all(engine, requests)
        await engine.sleep([MemoryTag.KV_CACHE])
        await engine.wake([MemoryTag.KV_CACHE])
        again = await generate_all(engine, requests)
        await engine.close()
        assert [result.output_ids for result in again] == [result.output_ids for result in results]
        return results

    one, two = (asyncio.run(scenario(num_devices)) for num_devices in (1, 2))
    assert [result.output_ids for result in one] == [result.output_ids for result in two]
    for alone, divided in zip(one, two, strict=True):
        assert divided.log_probs == pytest.approx(alone.log_probs, abs=1e-4)
