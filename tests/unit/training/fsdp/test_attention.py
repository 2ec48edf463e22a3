"""Packed attention against one plain softmax per sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from qwench.errors import ConfigError
from qwench.training import packed_attention
from qwench.training.fsdp import attention
from qwench.training.fsdp.attention import (
    check_attention,
    install_attention,
    packed_inputs,
    padded_attention,
    varlen_attention,
)

_CPU = torch.device("cpu")


def _plain_causal(query, key, value, scaling):
    """Attend in one sequence; [H, L, K] each, key heads repeated."""
    scores = query @ key.transpose(-1, -2) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), query_heads=st.sampled_from([2, 4]))
@settings(max_examples=25)
def test_padded_attention_equals_each_sequence_alone(lengths, query_heads):
    draw = torch.Generator().manual_seed(sum(lengths))
    num_tokens = sum(lengths)
    query = torch.randn(1, query_heads, num_tokens, 4, generator=draw, requires_grad=True)
    key, value = (torch.randn(1, 2, num_tokens, 4, generator=draw, requires_grad=True) for _ in range(2))
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    borders = packed_inputs("sdpa", cu_seqlens, _CPU)
    attended, _ = padded_attention(torch.nn.Module(), query, key, value, None, scaling=0.5, **borders)

    repeated = [heads[0].repeat_interleave(query_heads // 2, 0) for heads in (key, value)]
    pieces = [heads.split(lengths, dim=1) for heads in (query[0], *repeated)]
    alone = torch.cat([_plain_causal(*piece, 0.5) for piece in zip(*pieces, strict=True)], dim=1).transpose(0, 1)[None]
    torch.testing.assert_close(attended, alone, rtol=1e-5, atol=1e-6)

    slope = torch.randn(attended.shape, generator=draw)
    got = torch.autograd.grad((attended * slope).sum(), (query, key, value))
    wanted = torch.autograd.grad((alone * slope).sum(), (query, key, value))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_padded_indices_of_two_sequences():
    borders = packed_inputs("sdpa", torch.tensor([0, 2, 5], dtype=torch.int32), _CPU)
    assert borders["padded_index"].tolist() == [[0, 1, 0], [2, 3, 4]]
    assert borders["packed_index"].tolist() == [0, 1, 3, 4, 5]


def test_other_implementations_get_the_borders_under_transformers_names():
    borders = packed_inputs("varlen", torch.tensor([0, 2, 5], dtype=torch.int32), _CPU)
    assert borders["cu_seq_lens_q"].tolist() == borders["cu_seq_lens_k"].tolist() == [0, 2, 5]
    assert (borders["max_length_q"], borders["max_length_k"]) == (3, 3)


def _model(**changes):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=16, num_hidden_layers=2, **sizes, **changes))


@pytest.mark.parametrize(
    ("implementation", "device", "dtype", "message"),
    [
        ("flex", "cpu", torch.float32, "unknown --attn-implementation 'flex'; known: sdpa, varlen"),
        ("varlen", "cpu", torch.bfloat16, "use --attn-implementation sdpa"),
        ("varlen", "cuda", torch.float32, "computes in bfloat16"),
        ("flash_attention_2", "cuda", torch.bfloat16, "flash_attention_2 is not available here"),
        ("flash_attention_3", "cuda", torch.bfloat16, "flash_attention_3 is not available here"),
    ],
)
def test_an_implementation_that_cannot_run_here_is_refused(implementation, device, dtype, message):
    with pytest.raises(ConfigError, match=message):
        install_attention(_model(), implementation, device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize("implementation", ["varlen", "cudnn", "flash_attention_2", "flash_attention_3", "sdpa"])
def test_each_implementation_runs_where_its_package_is(monkeypatch, implementation):
    gpu, there = torch.device("cuda"), []
    monkeypatch.setattr(attention.cudnn_attention, "is_available", lambda: "cudnn" in there)
    for version in (2, 3):
        name = f"flash_attention_{version}"
        monkeypatch.setattr(attention, f"is_flash_attn_{version}_available", lambda name=name: name in there)
    if implementation in ("varlen", "sdpa"):
        check_attention(implementation, device=gpu, dtype=torch.bfloat16)
    else:
        there[:] = {"cudnn", "flash_attention_2", "flash_attention_3"} - {implementation}
        with pytest.raises(ConfigError, match=rf"--attn-implementation {implementation} (needs the package|is not available)"):
            check_attention(implementation, device=gpu, dtype=torch.bfloat16)
        there[:] = [implementation]
        check_attention(implementation, device=gpu, dtype=torch.bfloat16)
    model, taken = _model(), []
    monkeypatch.setattr(model, "set_attn_implementation", taken.append)
    install_attention(model, implementation, device=gpu, dtype=torch.bfloat16)
    ours = {"varlen": "qwench_varlen", "cudnn": "qwench_varlen", "sdpa": "qwench_sdpa"}
    assert taken == [ours.get(implementation, implementation)]
    assert AttentionInterface()["qwench_varlen"] is varlen_attention and AttentionInterface()["qwench_sdpa"] is padded_attention


def test_a_package_that_transformers_refuses_is_named(monkeypatch):
    model = _model()
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: (_ for _ in ()).throw(ImportError(f"no {name}")))
    with pytest.raises(ConfigError, match=r"--attn-implementation sdpa is not available here \(no qwench_sdpa\)"):
        install_attention(model, "sdpa", device=_CPU, dtype=torch.float32)


def test_torchs_packed_kernel_gets_what_the_padded_one_gets(monkeypatch):
    """In its place each sequence is attended to alone, between the borders that it is told."""

    def kernel(query, key, value, query_ends, key_ends, longest_query, longest_key, *, scale):
        assert (longest_query, longest_key, key_ends is query_ends) == (3, 3, True)
        pieces = zip(*(one.tensor_split(query_ends[1:-1].tolist()) for one in (query, key, value)), strict=True)
        rows = [_plain_causal(*(part.transpose(0, 1) for part in piece), scale).transpose(0, 1) for piece in pieces]
        return torch.cat(rows)

    monkeypatch.setattr(packed_attention, "_causal_varlen", kernel)
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    found = varlen_attention(torch.nn.Module(), query, key, value, None, scaling=0.5, **packed_inputs("varlen", ends, _CPU))
    expected = padded_attention(torch.nn.Module(), query, key, value, None, scaling=0.5, **packed_inputs("sdpa", ends, _CPU))
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] is None and expected[1] is None


def test_sliding_windows_are_refused():
    model = _model(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ConfigError, match="sliding_attention"):
        install_attention(model, "sdpa", device=_CPU, dtype=torch.float32)
