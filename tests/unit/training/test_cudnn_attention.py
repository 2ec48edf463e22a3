"""What cuDNN's attention gets, and what graphs that compute on a CPU make of it; cuDNN's own: gpu/test_packed_decoder.py."""

import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from qwench.models.decoder.gradients import Heads
from qwench.training import cudnn_attention
from qwench.training.cudnn_attention import CudnnAttention, is_available, with_adjacent_heads
from tests.fakes import cudnn

_CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("grouped", "kv_heads", "is_copied"), [(True, 2, True), (False, 2, False), (True, 1, False), (False, 1, False)]
)
def test_values_with_other_heads_between_them_are_copied(grouped: bool, kv_heads: int, is_copied: bool) -> None:
    heads = Heads(heads=4, kv_heads=kv_heads, head_dim=8, grouped=grouped)
    qkv = torch.randn(5, (4 + 2 * kv_heads) * 8)
    values = heads.values(qkv)
    found = with_adjacent_heads(values)
    assert_close(found, values, rtol=0, atol=0)
    assert (found.data_ptr() != values.data_ptr()) == is_copied
    assert kv_heads == 1 or found.stride(1) == 8


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[cudnn.Graph]:
    monkeypatch.setattr(cudnn_attention, "_handles", {})
    for plan in (cudnn_attention._forward_plan, cudnn_attention._backward_plan):
        plan.cache_clear()
    return cudnn.install(monkeypatch)


def test_the_package_is_looked_for(graphs: list[cudnn.Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_available()
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert not is_available()


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    k, v = (one.repeat_interleave(2, dim=1) for one in (k, v))
    scores = torch.einsum("qhk,shk->hqs", q, k) * scale
    scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf"))
    return torch.einsum("hqs,shk->qhk", scores.softmax(-1), v)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("lengths", [[5, 2, 9], [3] * 9])
def test_sequences_attend_apart_and_have_their_gradients(graphs: list[cudnn.Graph], lengths: list[int], grouped: bool) -> None:
    heads = Heads(heads=4, kv_heads=2, head_dim=8, grouped=grouped)
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 64, generator=draw).bfloat16()
    q, k, v = heads.split(qkv)
    q, k = q.contiguous(), k.contiguous()
    slope = torch.randn(q.shape, generator=draw).bfloat16()
    leaves = [one.detach().clone() if one is not v else one.detach() for one in (q, k, v)]
    for leaf in leaves:
        leaf.requires_grad_()
    attended = CudnnAttention(lengths, _CPU)(*leaves, scale=0.4)
    attended.backward(slope)
    exact = [one.detach().float().requires_grad_() for one in (q, k, v)]
    expected = torch.cat([_plain(*parts, 0.4) for parts in zip(*(one.split(lengths) for one in exact), strict=True)])
    expected.backward(slope.float())
    assert_close(attended.float(), expected, rtol=2e-2, atol=2e-2)
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and wanted.grad is not None
        assert_close(leaf.grad.float(), wanted.grad, rtol=3e-2, atol=5e-2)


def test_batches_of_nearly_one_size_share_their_plans(graphs: list[cudnn.Graph]) -> None:
    def run(lengths: list[int]) -> None:
        q, k = torch.ones(sum(lengths), 2, 4).bfloat16(), torch.ones(sum(lengths), 1, 4).bfloat16()
        attention = CudnnAttention(lengths, _CPU)
        output, stats = attention.forward(q, k, k, scale=0.5)
        attention.backward(output, q, k, k, output, stats, scale=0.5)

    for lengths in ([512, 300], [1], [1] * 8):
        run(lengths)
    forward, backward = graphs
    plans = [("create_execution_plans", ["a", "fallback"]), ("check_support",), ("build_plans",)]
    assert forward.calls == backward.calls == [("validate",), ("build_operation_graph",), *plans]
    assert forward.options["q"].dim == [8, 2, 512, 4]
    totals = ("max_total_seq_len_q", "max_total_seq_len_kv", "use_deterministic_algorithm")
    assert [backward.options[name] for name in totals] == [1024, 1024, False]
    torch.use_deterministic_algorithms(True)
    try:
        run([1])
    finally:
        torch.use_deterministic_algorithms(False)
    run([1] * 9)
    run([513, 1])
    assert [graph.options["q"].dim[0] for graph in graphs[2:]] == [8, 16, 16, 8, 8]
    assert [graph.options["q"].dim[2] for graph in graphs[2:]] == [512, 512, 512, 1024, 1024]
    assert graphs[2].options["use_deterministic_algorithm"]
