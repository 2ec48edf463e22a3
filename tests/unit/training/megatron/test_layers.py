"""Between the products of a layer: attention of each sequence by itself, gated activations and norms, and which there are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.testing import assert_close

from qwench.config.layout import ParallelLayout
from qwench.config.sections.training import TrainingConfig
from qwench.models.architecture import RopeSpec
from qwench.training import cudnn_attention
from qwench.training.cudnn_attention import CudnnAttention
from qwench.training.megatron import layers
from qwench.training.megatron.context_parallel import SequenceSplit, split_sequences
from qwench.training.megatron.fused import gated
from qwench.training.megatron.layers import GatedMLP, PackedSelfAttention, PackedTokens, RMSNorm, block_spec, uses_varlen_kernel
from qwench.training.megatron.model import transformer_config
from qwench.training.packed_attention import PackedAttention
from tests.unit.config.architectures import QWEN3_4B

_CPU, _GPU = torch.device("cpu"), torch.device("cuda")
_THETA = 100.0


@pytest.mark.parametrize(
    ("device", "dtype", "varlen"),
    [(_GPU, torch.bfloat16, True), (_GPU, torch.float32, False), (_CPU, torch.bfloat16, False)],
)
def test_the_packed_kernel_is_for_bfloat16_on_a_gpu(device, dtype, varlen):
    assert uses_varlen_kernel(device=device, dtype=dtype) is varlen


def _packed(split: SequenceSplit, *, varlen: bool = False) -> PackedTokens:
    rope = RopeSpec(head_dim=8, theta=_THETA)
    return PackedTokens.of(split, rope=rope, varlen=varlen, dtype=torch.float32, device=_CPU, group="cp")


@pytest.mark.parametrize(
    ("varlen", "cp_size", "installed", "kind"),
    [
        (True, 1, True, CudnnAttention),
        (True, 1, False, PackedAttention),
        (True, 2, True, PackedAttention),
        (False, 1, True, PackedAttention),
    ],
)
def test_cudnn_attends_to_whole_sequences_where_it_is_installed(monkeypatch, varlen, cp_size, installed, kind):
    monkeypatch.setattr(cudnn_attention, "is_available", lambda: installed)
    packed = _packed(split_sequences([5, 2], cp_rank=0, cp_size=cp_size, multiple_of=1), varlen=varlen)
    assert type(packed.attention) is kind
    assert packed.qkv_format == "thd" and packed.rope.shape == (8 if cp_size > 1 else 5, 8)
    if kind is PackedAttention:
        assert packed.attention._varlen is varlen


def _attention(weights: list[Tensor], norms: list[nn.Module | None], *, recomputes: bool) -> PackedSelfAttention:
    """Return the module with products of these weights, 4 heads and 2 groups of 8."""
    attention = PackedSelfAttention.__new__(PackedSelfAttention)
    nn.Module.__init__(attention)
    attention.linear_qkv, attention.linear_proj = ((lambda x, w=weight: (x @ w, "bias")) for weight in weights)
    attention.q_layernorm, attention.k_layernorm = norms
    attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition = 4, 2
    attention.config = SimpleNamespace(kv_channels=8, layernorm_epsilon=1e-2)
    attention.checkpoint_core_attention = recomputes
    return attention


def _plain(x_TD: Tensor, weights: list[Tensor], norms: list[Tensor | None]) -> Tensor:
    """Return the layer's output for one sequence."""
    groups = (x_TD @ weights[0]).view(len(x_TD), 2, 4, 8)  # two queries, a key and a value in each
    angles = torch.arange(len(x_TD))[:, None] * _THETA ** -(torch.arange(4) / 4)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    parts = [groups[:, :, :2], groups[:, :, 2:3]]
    for i, norm in enumerate(norms):
        if norm is not None:
            parts[i] = parts[i] / (parts[i].square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm
        turned = torch.complex(*parts[i].chunk(2, dim=-1)) * turns
        parts[i] = torch.cat((turned.real, turned.imag), dim=-1)
    scores = torch.einsum("qghk,sgk->ghqs", parts[0], parts[1][:, :, 0]) / 8**0.5
    scores = scores.masked_fill(torch.ones(len(x_TD), len(x_TD)).triu(1).bool(), float("-inf"))
    return torch.einsum("ghqs,sgk->qghk", scores.softmax(-1), groups[:, :, 3]).flatten(1) @ weights[1]


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize(("normed", "recomputes"), [(True, False), (False, True)])
def test_a_layer_attends_in_each_sequence_also_over_ranks(monkeypatch, cp_size, normed, recomputes):
    draw = torch.Generator().manual_seed(0)
    lengths, tokens = [5, 2], torch.randn(7, 6, generator=draw)
    weights = [torch.randn(6, 64, generator=draw), torch.randn(32, 6, generator=draw)]
    scales = [1 + torch.rand(8, generator=draw) if normed else None for _ in range(2)]
    norms = [None if scale is None else SimpleNamespace(weight=scale) for scale in scales]
    if recomputes:
        norms[0] = SimpleNamespace()  # as megatron-core's IdentityOp
    recomputed = []
    monkeypatch.setattr(layers, "checkpoint", lambda call, *given: recomputed.append(given[0]) or call(*given[1:]))
    attention = _attention(weights, norms, recomputes=recomputes)
    splits = [split_sequences(lengths, cp_rank=rank, cp_size=cp_size, multiple_of=1) for rank in range(cp_size)]
    keys = list[Tensor]()

    def keep(own: Tensor, group: str) -> Tensor:
        assert group == "cp"
        keys.append(own)
        return torch.cat([own] * cp_size)

    def run(split: SequenceSplit) -> Tensor:
        local = torch.where(split.real[:, None], tokens[split.source], 1e4)[:, None]
        output, bias = attention(local, None, packed_seq_params=_packed(split))
        assert bias == "bias" and output.shape == local.shape
        return output[:, 0]

    monkeypatch.setattr(layers, "gather_keys", keep)
    outputs = [run(split) for split in splits]
    if cp_size > 1:
        monkeypatch.setattr(layers, "gather_keys", lambda own, group: torch.cat(keys))
        outputs = [run(split) for split in splits]
    expected = torch.cat([_plain(sequence, weights, scales) for sequence in tokens.split(lengths)])
    assert_close(torch.cat(outputs)[splits[0].merged], expected, rtol=1e-4, atol=1e-4)
    assert recomputed == [False] * len(recomputed) and bool(recomputed) is recomputes


def test_an_mlp_gates_between_its_products():
    mlp = GatedMLP.__new__(GatedMLP)
    nn.Module.__init__(mlp)
    mlp.linear_fc1, mlp.linear_fc2 = lambda x: (torch.cat((x, x + 1), dim=-1), None), lambda x: (3 * x, "bias")
    x = torch.tensor([[[0.5, -1.0]], [[2.0, 0.0]]])
    output, bias = mlp(x)
    assert_close(output, 3 * x * x.sigmoid() * (x + 1))
    assert bias == "bias"


@pytest.mark.parametrize("normed", [True, False])
def test_gradients_of_a_layer_are_those_of_autograd(normed):
    draw = torch.Generator().manual_seed(3)
    made = [torch.randn(5, 6, generator=draw), torch.randn(6, 64, generator=draw), torch.randn(32, 6, generator=draw)]
    made += [1 + torch.rand(8, generator=draw) for _ in range(2)] if normed else []
    slope, found = torch.randn(5, 6, generator=draw), []
    for computes in ("layer", "plain"):
        tokens, *weights = leaves = [one.clone().requires_grad_() for one in made]
        scales = weights[2:] or [None, None]
        if computes == "layer":
            norms = [None if scale is None else SimpleNamespace(weight=scale) for scale in scales]
            packed = _packed(split_sequences([5], cp_rank=0, cp_size=1, multiple_of=1))
            output = _attention(weights[:2], norms, recomputes=False)(tokens[:, None], None, packed_seq_params=packed)[0][:, 0]
        else:
            output = _plain(tokens, weights[:2], scales)
        found.append(torch.autograd.grad((output * slope).sum(), leaves))
    assert_close(*found, rtol=1e-3, atol=1e-3)
    gate_up = torch.randn(3, 8, generator=draw).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    plain, ours = gate * gate.sigmoid() * up, gated(gate_up)
    assert_close(ours, plain)
    slopes = torch.randn(3, 4, generator=draw)
    assert_close(*(torch.autograd.grad((one * slopes).sum(), gate_up)[0] for one in (ours, plain)))


@pytest.mark.parametrize(("qk_norm", "sequence_parallel"), [(True, True), (False, False)])
def test_stages_of_megatrons_layers_have_our_norms_attention_and_activation(monkeypatch, qk_norm, sequence_parallel):
    model = QWEN3_4B if qk_norm else replace(QWEN3_4B, qk_norm=False)
    layout = ParallelLayout(tp=2, sequence_parallel=sequence_parallel)
    config = transformer_config(model, layout, TrainingConfig(), param_dtype=torch.bfloat16)
    monkeypatch.setattr(layers, "get_num_layers_to_build", lambda given: 3 if given is config else None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    stage = block_spec(config, transformer_impl="local")
    assert stage.layer_norm is RMSNorm and len(stage.layer_specs) == 3
    layer = stage.layer_specs[0].submodules
    attention = layer.self_attention.submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is RMSNorm
    assert [norm is RMSNorm for norm in (attention.q_layernorm, attention.k_layernorm)] == [qk_norm] * 2
    assert (layer.self_attention.module, attention.core_attention) == (PackedSelfAttention, IdentityOp)
    assert layer.mlp.module is GatedMLP
    norm = RMSNorm(config, 2, eps=0.5)
    assert norm.weight.dtype == torch.bfloat16 and norm.weight.tolist() == [1, 1]
    assert norm.weight.sequence_parallel is sequence_parallel
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    # The root of (1 + 9) / 2 + 0.5 is 2.345.
    assert_close(norm(torch.tensor([1.0, 3.0]).bfloat16()).float(), torch.tensor([0.4264, 2.5584]), rtol=1e-2, atol=1e-2)
