"""The CUDA kernels of the embedded engine against the plain reference, and the engine with and without graphs."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from qwench.engines.embedded.compute.attention import TorchAttention
from qwench.engines.embedded.compute.batch import Chunks, StepBatch
from qwench.engines.embedded.compute.decode_work import DecodeWork, pack_decode_work
from qwench.engines.protocol import MemoryTag
from qwench.models.hf import architecture_of
from qwench.models.memory import kv_bytes_per_token
from tests.contract.engine_hosts import ask, generate_all, make_engine, make_model, prompt_of, reference_log_probs

pytestmark = [pytest.mark.gpu(1), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

PAGE_SIZE = 16
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def attention_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return pytest.importorskip("qwench.engines.embedded.compute.attention_cuda", exc_type=ImportError)


def chunks_of(starts: list[int], counts: list[int], tables: np.ndarray) -> Chunks:
    return Chunks(starts=np.array(starts, dtype=np.int32), counts=np.array(counts, dtype=np.int32), tables=tables)


def batch_of(decodes: Chunks, prefills: Chunks, max_sharing: int = 1) -> StepBatch:
    rows = len(decodes.counts)
    packed, size = pack_decode_work(
        decodes.lengths, decodes.tables, page_size=PAGE_SIZE, num_rows=rows, max_sharing=max_sharing
    )
    unused = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    return StepBatch(
        token_ids=unused,
        positions=unused,
        slots=unused,
        logit_tokens=unused,
        scored=(),
        decodes=decodes,
        prefills=prefills,
        work=DecodeWork.view(torch.from_numpy(packed).to(DEVICE), num_rows=rows, size=size),
    )


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (14, 2, 64), (9, 3, 64), (4, 4, 32)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_cuda_attention_equals_the_reference(attention_cuda, heads, kv_heads, head_dim, dtype, tolerance):
    torch.manual_seed(0)
    lengths = [1, 15, 16, 17, 511, 512, 513, 1500]
    starts, counts = [0, 40, 0, 200], [33, 7, 1, 100]
    num_pages = 97
    num_rows = len(lengths) + len(starts)
    tables = np.random.default_rng(0).integers(1, num_pages, (num_rows, 94)).astype(np.int32)
    decodes = chunks_of([length - 1 for length in lengths], [1] * len(lengths), tables[: len(lengths)])
    prefills = chunks_of(starts, counts, tables[len(lengths) :])
    batch = batch_of(decodes, prefills)
    keys, values = torch.randn(2, num_pages, PAGE_SIZE, kv_heads, head_dim, device=DEVICE, dtype=dtype)
    q_THK = torch.randn(len(lengths) + sum(counts), heads, head_dim, device=DEVICE, dtype=dtype)
    outputs = []
    for attention in (attention_cuda.CudaAttention(PAGE_SIZE, dtype, DEVICE), TorchAttention(PAGE_SIZE, dtype, DEVICE)):
        attention.prepare(batch)
        outputs.append(attention(q_THK, keys, values))
    torch.testing.assert_close(outputs[0], outputs[1], atol=tolerance, rtol=tolerance)


def test_shared_chunks_change_no_bit(attention_cuda):
    torch.manual_seed(0)
    lengths = [700] * 11 + [300, 1000]
    tables = np.random.default_rng(0).permutation(len(lengths) * 64).reshape(-1, 64).astype(np.int32)
    tables[:9, :32] = tables[0, :32]
    keys, values = torch.randn(2, tables.size, PAGE_SIZE, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    q_THK = torch.randn(len(lengths), 16, 128, device=DEVICE, dtype=torch.bfloat16)
    decodes = chunks_of([length - 1 for length in lengths], [1] * len(lengths), tables)
    none = chunks_of([], [], np.zeros((0, 1), dtype=np.int32))
    outputs = []
    for max_sharing in (1, 8):
        attention = attention_cuda.CudaAttention(PAGE_SIZE, torch.bfloat16, DEVICE)
        attention.prepare(batch_of(decodes, none, max_sharing))
        outputs.append(attention(q_THK, keys, values))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_engine_on_cuda_gives_hugging_face_log_probs(graphs, family):
    model = make_model(family)
    requests = [
        ask(f"r{i}", prompt_of(3 + 11 * (i // 3), seed=i // 3), seed=i, max_new_tokens=5 + 7 * i, ignore_eos=True)
        for i in range(9)
    ]

    async def scenario():
        engine = make_engine(model, device="cuda", dtype=torch.float32, cuda_graphs=graphs)
        results = await generate_all(engine, requests)
        await engine.close()
        return results

    for request, result in zip(requests, asyncio.run(scenario()), strict=True):
        torch.testing.assert_close(
            torch.tensor(result.log_probs), reference_log_probs(model, request, result), atol=1e-4, rtol=0
        )


def test_sleep_gives_the_cache_back_and_keeps_the_graphs():
    model, tokens = make_model("qwen3"), 400_000
    cache_bytes = tokens * kv_bytes_per_token(architecture_of(model.config))
    requests = [ask(f"r{i}", prompt_of(5, seed=i), max_new_tokens=20, ignore_eos=True, seed=i) for i in range(4)]

    async def scenario():
        engine = make_engine(model, device="cuda", dtype=torch.bfloat16, kv_cache_tokens=tokens, max_running_requests=400)
        before = await generate_all(engine, requests)
        graphs = engine._runner._decoder._graphs
        num_graphs, awake = len(graphs._graphs), torch.cuda.mem_get_info()[0]
        await engine.sleep([MemoryTag.KV_CACHE])
        freed = torch.cuda.mem_get_info()[0] - awake
        await engine.wake([MemoryTag.KV_CACHE])
        after = await generate_all(engine, requests)
        assert engine._runner._decoder._graphs is graphs and len(graphs._graphs) == num_graphs > 0
        await engine.close()
        return freed, [result.output_ids for result in before], [result.output_ids for result in after]

    freed, before, after = asyncio.run(scenario())
    assert freed >= cache_bytes
    assert before == after


def test_a_capture_leaves_cached_pinned_memory_as_it_is():
    kept = torch.empty(123_456_789, dtype=torch.uint8, pin_memory=True)
    address = kept.data_ptr()
    del kept

    async def scenario():
        engine = make_engine(make_model("qwen3"), device="cuda", dtype=torch.bfloat16, cuda_graphs=True)
        await generate_all(engine, [ask(f"r{i}", prompt_of(5, seed=i), max_new_tokens=4) for i in range(4)])
        await engine.close()

    asyncio.run(scenario())
    assert torch.empty(123_456_789, dtype=torch.uint8, pin_memory=True).data_ptr() == address
