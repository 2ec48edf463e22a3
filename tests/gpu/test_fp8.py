"""Block-wise FP8 on a GPU: the kernel against float64, quantization against the host's, and the engine against Hugging Face."""

from __future__ import annotations

import asyncio

import pytest
import torch

from qwench.models.decoder.linear import fp8_linear
from qwench.models.fp8 import dequantize, quantize, quantized
from tests.contract.engine_hosts import ask, generate_all, make_model, prompt_of, reference_log_probs
from tests.contract.test_fp8_engine import Source, by_hand, fp8_engine

pytestmark = [pytest.mark.gpu(1), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 64, 65, 200, 511, 512, 700])
@pytest.mark.parametrize(("size_n", "size_k"), [(128, 128), (256, 384), (100, 130), (2560, 9728)])
def test_product_is_that_with_the_weights_it_stands_for(num_rows, size_n, size_k):
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, size_k, generator=generator).bfloat16().cuda()
    weight, scale = quantize(torch.randn(size_n, size_k, generator=generator).cuda())
    expected = x.double() @ dequantize(weight, scale, torch.float64).T
    error = (fp8_linear(x, weight, scale).double() - expected).abs().max() / expected.abs().max()
    assert error < 0.01


def test_a_row_does_not_depend_on_the_rows_beside_it_in_its_tile():
    x = torch.randn(64, 512).bfloat16().cuda()
    weight, scale = quantize(torch.randn(256, 512).cuda())
    together = fp8_linear(x, weight, scale)
    shuffled = torch.randperm(64, device="cuda")
    assert torch.equal(fp8_linear(x[shuffled], weight, scale), together[shuffled])


@pytest.mark.parametrize("shape", [(128, 128), (300, 700), (5, 7), (1024, 2560)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantization_and_its_inverse_give_the_bits_of_the_host(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.02).to(dtype)
    weight[:128, :128] *= shape[0] < 1024  # a block of zeros
    weight[-1, -1] = 3.0
    values, scales = quantize(weight)
    for ours, theirs in zip(quantize(weight.cuda()), (values, scales), strict=True):
        assert ours.is_contiguous() and torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))
    for wanted in (torch.bfloat16, torch.float32, torch.float64):
        back = dequantize(values.cuda(), scales.cuda(), wanted)
        assert back.dtype == wanted and torch.equal(back.cpu(), dequantize(values, scales, wanted))


def test_what_is_not_a_number_stays_so():
    weight = torch.randn(130, 140).cuda()
    weight[129, 3] = float("nan")
    values, scales = quantize(weight)
    assert torch.isnan(dequantize(values, scales, torch.float32)).nonzero().tolist() == [[129, 3]]


def test_a_matrix_that_is_not_contiguous_is_quantized_as_it_reads():
    weight = torch.randn(256, 300).bfloat16().cuda()
    for ours, copied in zip(quantize(weight.t()), quantize(weight.t().contiguous()), strict=True):
        assert torch.equal(ours.view(torch.uint8), copied.view(torch.uint8))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_engine_samples_from_the_weights_it_stands_for(cuda_graphs):
    model = make_model("qwen3")
    requests = [ask(str(i), prompt_of(5 + i, seed=i), seed=i, ignore_eos=True, max_new_tokens=12) for i in range(20)]

    async def scenario():
        engine = fp8_engine(model, device="cuda", dtype=torch.bfloat16, cuda_graphs=cuda_graphs)
        buckets = (
            [(name, tensor.cuda().bfloat16()) for name, tensor in bucket] for bucket in Source(model).weights(bucket_bytes=1)
        )
        await engine.update_weights(quantized(buckets), version=1)
        results = await generate_all(engine, requests)
        await engine.close()
        return results

    stands_for = by_hand(model.bfloat16().float())
    gaps = [
        (torch.tensor(result.log_probs) - reference_log_probs(stands_for, request, result)).abs().mean()
        for request, result in zip(requests, asyncio.run(scenario()), strict=True)
    ]
    assert float(torch.stack(gaps).mean()) < 0.05
