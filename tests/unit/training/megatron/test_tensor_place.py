"""Where shards lie in a torch_dist checkpoint, against stacking and cutting whole tensors."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwench.models.hf import architecture_of
from qwench.models.megatron_names import WeightRule, rules, to_megatron, tp_shard
from qwench.training.megatron.tensor_place import TensorPlace

CONFIG = Qwen3Config(
    vocab_size=10,  # does not divide by 4
    hidden_size=6,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=2,
    tie_word_embeddings=False,
)
MODEL = architecture_of(CONFIG)


def _whole_tensors() -> list[tuple[WeightRule, Tensor]]:
    torch.manual_seed(0)
    weights = Qwen3ForCausalLM(CONFIG).state_dict()
    return [
        (rule, to_megatron(rule, [torch.randn_like(weights[name]) for name in rule.hf_names], MODEL)) for rule in rules(MODEL)
    ]


WHOLE = _whole_tensors()


def _stored(whole: list[tuple[WeightRule, Tensor]]) -> dict[str, Tensor]:
    """Stack layers, as the checkpoint does."""
    by_key: dict[str, list[Tensor]] = defaultdict(list)
    stacked: dict[str, bool] = {}
    for rule, tensor in whole:
        by_key[rule.checkpoint_key].append(tensor)
        stacked[rule.checkpoint_key] = rule.layer is not None
    return {key: torch.stack(tensors) if stacked[key] else tensors[0] for key, tensors in by_key.items()}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@given(data=st.data())
@settings(max_examples=20)
def test_shards_of_shards_lie_in_the_checkpoint_where_the_whole_tensor_has_them(tp_size: int, data: st.DataObject) -> None:
    expected = _stored(WHOLE)
    found = {key: torch.full_like(tensor, float("nan")) for key, tensor in expected.items()}
    for tp_rank in range(tp_size):
        place = TensorPlace(model=MODEL, tp_rank=tp_rank, tp_size=tp_size)
        for rule, whole in WHOLE:
            local = tp_shard(rule, whole, tp_rank, tp_size)
            assert place.stored_shape(rule, local.shape) == expected[rule.checkpoint_key].shape
            cut = data.draw(st.integers(0, local.numel()))
            for start, values in ((0, local.reshape(-1)[:cut]), (cut, local.reshape(-1)[cut:])):
                for piece in place.pieces(rule, local.shape, start, values):
                    region = tuple(
                        slice(offset, offset + size) for offset, size in zip(piece.offsets, piece.values.shape, strict=True)
                    )
                    found[rule.checkpoint_key][region] = piece.values
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
