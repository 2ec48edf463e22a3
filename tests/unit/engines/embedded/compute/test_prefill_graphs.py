"""Steps with prefills in recorded pieces, rehearsed where nothing can be captured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwench.engines.embedded.compute.prefill_graphs import BUCKETS, PrefillGraphs
from tests.contract.engine_hosts import ask, generate_all, make_engine, make_model, prompt_of


def rehearse(work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record as a captured graph does: later runs write into the tensors of the first one."""
    tensors = work()

    def again() -> None:
        for place, new in zip(tensors, work(), strict=True):
            place.copy_(new)

    return again, tensors


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_recorded_pieces_give_the_tokens_of_the_whole_pass(family):
    model = make_model(family)
    prompts = [prompt_of(length, seed=length) for length in (1, 5, 9, 17, 40, 130, 512, 600)]
    requests = [
        ask(f"r{length}-{i}", prompt, seed=i, max_new_tokens=4 + 3 * i, ignore_eos=True)
        for length, prompt in enumerate(prompts)
        for i in range(3)
    ]

    async def scenario(recorded: bool):
        engine = make_engine(model, prefill_chunk_tokens=600, native_kernels=False)
        assert engine.max_request_tokens > 600  # takes the memory of the cache
        decoder = engine._runner._bind()
        graphs = PrefillGraphs(decoder._model, decoder.kv_cache, rehearse, dtype=torch.float32, device=torch.device("cpu"))
        decoder._prefill_graphs = graphs if recorded else None
        results = [result for request in requests[::2] for result in await generate_all(engine, [request])]
        results += await generate_all(engine, requests[1::2])
        await engine.close()
        return results, set(graphs._passes)

    plain, unused = asyncio.run(scenario(recorded=False))
    recorded, buckets = asyncio.run(scenario(recorded=True))
    assert unused == set() and {16, 64, 192, 512} <= buckets <= set(BUCKETS)
    assert [result.output_ids for result in recorded] == [result.output_ids for result in plain]
    for one, other in zip(recorded, plain, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
