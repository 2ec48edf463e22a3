"""torch's packed kernel against padded rows, also where pieces have more keys than queries."""

import pytest
import torch

from qwench.training.packed_attention import PackedAttention

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("earlier", [[0, 0, 0], [0, 200, 64]], ids=["whole sequences", "chunks"])
def test_both_kernels_agree(earlier: list[int]):
    query_lengths = [130, 64, 1]
    key_lengths = [queries + before for queries, before in zip(query_lengths, earlier, strict=True)]
    draw = torch.Generator().manual_seed(2)

    def heads(num_tokens: int, num_heads: int) -> torch.Tensor:
        drawn = torch.randn(num_tokens, num_heads, 64, generator=draw)
        return drawn.to("cuda", torch.bfloat16).requires_grad_()

    query, key, value = heads(sum(query_lengths), 8), heads(sum(key_lengths), 2), heads(sum(key_lengths), 2)
    slope = torch.randn(query.shape, generator=draw).to("cuda", torch.bfloat16)
    device = torch.device("cuda")
    found = []
    for varlen in (True, False):
        attended = PackedAttention(query_lengths, key_lengths, varlen=varlen, device=device)(query, key, value, scale=0.125)
        found.append((attended, *torch.autograd.grad((attended * slope).sum(), (query, key, value))))
    for packed, padded in zip(*found, strict=True):
        assert (packed.float() - padded.float()).norm() < 0.02 * padded.float().norm()
