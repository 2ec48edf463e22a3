"""An embedded engine of two GPUs beside one of one."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import torch

from qwench.engines.protocol import MemoryTag
from qwench.errors import EngineError
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
        if num_devices > 1:
            reach = torch.cuda.can_device_access_peer(0, 1) and torch.cuda.can_device_access_peer(1, 0)
            assert (engine._followers.group.peers is not None) == reach
        await engine.close()
        assert [result.output_ids for result in again] == [result.output_ids for result in results]
        return results

    one, two = (asyncio.run(scenario(num_devices)) for num_devices in (1, 2))
    assert [result.output_ids for result in one] == [result.output_ids for result in two]
    for alone, divided in zip(one, two, strict=True):
        assert divided.log_probs == pytest.approx(alone.log_probs, abs=1e-4)


@pytest.mark.parametrize("stops", [False, True])
def test_a_rank_that_dies_fails_the_engine(stops):
    async def scenario():
        engine = make_engine(make_model("llama"), num_devices=2, device="cuda", dtype=torch.float32)
        await generate_all(engine, [ask("before", [5], max_new_tokens=20, ignore_eos=True)])
        process = engine._followers._processes[0]
        running = asyncio.ensure_future(engine.generate(ask("running", [5], max_new_tokens=1000, ignore_eos=True)))
        while (await engine.stats()).generated_tokens < 25:
            await asyncio.sleep(0)
        if stops:
            os.kill(process.pid, signal.SIGSTOP)  # the kernels of rank 0 wait
            await asyncio.sleep(1)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"rank 1 \(exit code -9\)"):
            await running
        await engine.close()

    asyncio.run(scenario())
