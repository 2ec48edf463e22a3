"""Bytes and FLOPs, worked out by hand."""

from dataclasses import replace

import pytest

from qwench.models import memory
from qwench.models.architecture import PROJECTIONS
from qwench.models.hf import architecture_of
from qwench.models.memory import (
    RankBytes,
    SequenceCost,
    StateBytes,
    adapter_bytes,
    fp8_bytes,
    fsdp_bytes,
    gib,
    kv_bytes_per_token,
    megatron_bytes,
    num_adapter_parameters,
    num_parameters,
    projection_shapes,
)
from qwench.models.random_qwen3 import SIZES
from tests.unit.config.architectures import QWEN3_4B

BF16 = StateBytes(param=2, moments=8, offloaded=0.0)
# hidden 4, 2 heads of 2 over 1 group, ffn 8, vocab 10, 4 layers: a layer has 192 - 16 = 144 + ... see below.
SMALL = replace(
    QWEN3_4B,
    num_layers=4,
    hidden_size=4,
    ffn_hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=10,
)
MATRICES = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4 + 3 * 4 * 8  # q, k, v, o, MLP: 144
NORMS = 4 + 4 + 2 + 2  # of inputs, of queries and keys
PARAMETERS = 4 * (MATRICES + NORMS) + 10 * 4 + 4  # 668


def test_projections_have_the_shapes_of_their_matrices_beside_biases():
    biased = replace(SMALL, qkv_bias=True, attention_output_bias=True, mlp_bias=True)
    attention = {"q_proj": (4, 4), "k_proj": (2, 4), "v_proj": (2, 4), "o_proj": (4, 4)}
    assert projection_shapes(biased) == attention | {"gate_proj": (8, 4), "up_proj": (8, 4), "down_proj": (4, 8)}


@pytest.mark.parametrize(
    ("size", "expected"),
    [("0.6B", 114_688), ("1.7B", 114_688), ("4B", 147_456), ("8B", 147_456), ("14B", 163_840), ("32B", 262_144)],
)
def test_kv_bytes_per_token_in_bf16(size, expected):
    assert kv_bytes_per_token(architecture_of(SIZES[size].to_config(vocab_size=151_936))) == expected


def test_tied_embeddings_count_once():
    assert num_parameters(SMALL) == PARAMETERS == 668
    assert num_parameters(replace(SMALL, tied_head=False)) == 668 + 40


def test_flops_are_two_for_each_weight_of_a_matrix_and_four_head_dims_for_a_causal_pair_of_two():
    cost = SequenceCost.of_model(SMALL)
    assert cost.linear == 2 * (4 * MATRICES + 40)
    assert cost.head == 2 * 40
    assert cost.quadratic == 2 * 4 * 2 * 2  # 2 products x 2 FLOPs x half of the pairs, for 4 layers of 2 heads of size 2
    assert cost.of(3) == 3 * cost.linear + 9 * cost.quadratic


def test_fsdp_ranks_hold_masters_as_their_weights():
    held = fsdp_bytes(SMALL, BF16, num_shards=2, holds_reference=True)
    # A small gradient stays whole on every rank until the last micro-batch.
    assert held == RankBytes(weights=334 * 4, gradients=668 * 4, optimizer=334 * 8, host_optimizer=0, host_reference=334 * 2)
    assert (held.device, held.host) == (334 * 12 + 668 * 4, 334 * 2)
    assert replace(held, host_optimizer=1).host == 334 * 2 + 1


def test_one_rank_holds_masters_in_two_halves():
    held = fsdp_bytes(SMALL, BF16, num_shards=1, holds_reference=False)
    assert held == RankBytes(weights=668 * 2, gradients=668 * 4, optimizer=668 * 10, host_optimizer=0, host_reference=0)


def test_fsdp_ranks_that_offload_keep_rounded_weights_and_host_masters():
    held = fsdp_bytes(SMALL, StateBytes(param=2, moments=4, offloaded=1.0), num_shards=1, holds_reference=False)
    assert held == RankBytes(weights=668 * 2, gradients=668 * 4, optimizer=0, host_optimizer=668 * 8, host_reference=0)


def test_large_gradients_are_sharded():
    held = fsdp_bytes(QWEN3_4B, BF16, num_shards=8, holds_reference=False)
    assert held.gradients == -(-num_parameters(QWEN3_4B) // 8) * 4


def test_ranks_that_compute_with_whole_weights_hold_them_and_whole_gradients_besides_their_shards():
    whole = num_parameters(QWEN3_4B)
    held = fsdp_bytes(QWEN3_4B, BF16, num_shards=4, holds_reference=False, computes_whole=True)
    assert (held.weights, held.gradients, held.optimizer) == (whole // 4 * 4 + whole * 2, whole * 4, whole // 4 * 8)
    alone = fsdp_bytes(SMALL, BF16, num_shards=1, holds_reference=False, computes_whole=True)
    assert alone == fsdp_bytes(SMALL, BF16, num_shards=1, holds_reference=False)


def test_adapters_are_trained_beside_a_model_of_which_no_rank_keeps_more_than_rounded_shards():
    # Rows and columns of the matrices of a layer: q and o 4 + 4, k and v 2 + 4, gate, up and down 8 + 4.
    assert num_adapter_parameters(SMALL, PROJECTIONS, 2) == 4 * 2 * (2 * 8 + 2 * 6 + 3 * 12) == 512
    assert num_adapter_parameters(SMALL, ("k_proj", "down_proj"), 3) == 4 * 3 * (6 + 12)
    held = adapter_bytes(SMALL, BF16, num_shards=2, num_trained=100, keeps_start=False, holds_reference=True)
    assert held == RankBytes(
        weights=334 * 2 + 50 * 4, gradients=400, optimizer=50 * 8, host_optimizer=0, host_reference=334 * 2
    )
    offloaded = StateBytes(param=2, moments=8, offloaded=1.0)
    held = adapter_bytes(SMALL, offloaded, num_shards=1, num_trained=100, keeps_start=True, holds_reference=False)
    assert held == RankBytes(weights=668 * 2 + 100 * 4, gradients=400, optimizer=0, host_optimizer=1200, host_reference=0)


def test_each_rank_holds_all_weights_in_fewer_bits():
    fewer = {"num_quantised": 400, "quantised": 0.5}
    held = adapter_bytes(SMALL, BF16, num_shards=2, num_trained=100, keeps_start=False, holds_reference=True, **fewer)
    assert held.weights == (668 - 400) // 2 * 2 + 400 // 2 + 50 * 4
    assert held.host_reference == ((668 - 400) // 2 + 400) * 2, "a teacher is not in fewer bits"


@pytest.mark.parametrize("room", [0, -1])
def test_gradients_up_to_a_size_stay_whole(room, monkeypatch):
    monkeypatch.setattr(memory, "WHOLE_GRADIENT_BYTES", 668 * 4 + room)
    held = fsdp_bytes(SMALL, BF16, num_shards=4, holds_reference=False)
    assert held.gradients == (668 if room == 0 else 167) * 4
    adapters = adapter_bytes(SMALL, BF16, num_shards=4, num_trained=668, keeps_start=False, holds_reference=False)
    assert adapters.gradients == (668 if room == 0 else 167) * 4


def test_half_of_the_state_may_lie_on_the_host():
    half = StateBytes(param=2, moments=4, offloaded=0.5)
    assert fsdp_bytes(SMALL, half, num_shards=3, holds_reference=True) == RankBytes(
        weights=223 * 2, gradients=668 * 4, optimizer=669, host_optimizer=892, host_reference=446
    )
    assert adapter_bytes(SMALL, half, num_shards=3, num_trained=100, keeps_start=True, holds_reference=False) == RankBytes(
        weights=223 * 2 + 34 * 4, gradients=400, optimizer=102, host_optimizer=136, host_reference=0
    )
    held = megatron_bytes(SMALL, half, tp=1, pp=1, num_replicas=3, holds_reference=False)
    assert (held.optimizer, held.host_optimizer, held.host_reference) == (223 * 4, 223 * 4, 0)


def test_megatrons_float32_weights_are_their_masters_and_a_stage_may_have_more_layers():
    float32 = StateBytes(param=4, moments=8, offloaded=0.0)
    held = megatron_bytes(SMALL, float32, tp=1, pp=2, num_replicas=1, holds_reference=True, stage_layers=3)
    stage = 3 * (MATRICES + NORMS) + 40 + 4
    assert held == RankBytes(
        weights=stage * 4, gradients=stage * 4, optimizer=stage * 8, host_optimizer=0, host_reference=stage * 4
    )
    untied = replace(SMALL, tied_head=False, vocab_size=11)
    layers = 4 * (MATRICES + NORMS) + 4
    for pp, tables in ((1, 2), (2, 1)):
        held = megatron_bytes(untied, float32, tp=2, pp=pp, num_replicas=1, holds_reference=False, stage_layers=4)
        assert held.gradients == (layers - 4 * MATRICES // 2 + tables * 6 * 4) * 4, "half of 11 rows is 6"


def test_fp8_models_have_a_scale_for_each_block():
    wide = replace(SMALL, hidden_size=129, ffn_hidden_size=256)
    # q, k, v: 1 x 2 blocks, o: 2 x 1, gate and up: 2 x 2, down: 2 x 2.
    matrices = 4 * (129 * 4 + 129 * 2 * 2 + 4 * 129 + 3 * 129 * 256)
    rest = 4 * (2 * 129 + 2 * 2) + 10 * 129 + 129
    assert fp8_bytes(wide, element_bytes=2) == matrices + 4 * 4 * (4 * 2 + 3 * 4) + 2 * rest


def test_a_megatron_rank_holds_a_frozen_stage_and_its_share_of_adapters():
    # On two tensor-parallel ranks: q 4/2 + 4, k and v 2/2 + 4, o 4/2 + 4, gate and up 8/2 + 4, down 8/2 + 4.
    share = num_adapter_parameters(SMALL, PROJECTIONS, 2, num_layers=3, tp=2)
    assert share == 3 * 2 * (6 + 2 * 5 + 6 + 3 * 8) == 276
    whole = megatron_bytes(SMALL, BF16, tp=2, pp=1, num_replicas=2, holds_reference=False)
    held = megatron_bytes(SMALL, BF16, tp=2, pp=1, num_replicas=2, holds_reference=False, num_adapted=share)
    assert held.weights == whole.weights + 2 * 276
    assert (held.gradients, held.optimizer) == (4 * 276, 138 * 12)
    started = megatron_bytes(
        SMALL, BF16, tp=2, pp=1, num_replicas=2, holds_reference=False, num_adapted=share, keeps_start=True
    )
    assert started.weights == held.weights + 2 * 276
    fewer = megatron_bytes(
        SMALL, BF16, tp=2, pp=1, num_replicas=2, holds_reference=False, num_adapted=share, num_quantised=100, quantised=0.5
    )
    assert fewer.weights == held.weights - 100 * 2 + 50


def test_megatron_ranks_hold_a_share_of_a_stage():
    held = megatron_bytes(SMALL, BF16, tp=2, pp=2, num_replicas=2, holds_reference=True)
    stage = 2 * (MATRICES // 2 + NORMS) + 5 * 4 + 4  # two layers, half the embedding, the last norm: 192
    assert held == RankBytes(
        weights=stage * 2, gradients=stage * 4, optimizer=stage // 2 * 12, host_optimizer=0, host_reference=stage * 2
    )
    assert megatron_bytes(SMALL, BF16, tp=1, pp=1, num_replicas=1, holds_reference=False).device == 668 * 18


@pytest.mark.parametrize(("size", "text"), [(7.486, "7.49"), (80, "80"), (0.0012345, "0.00123"), (1536, "1536")])
def test_bytes_are_written_in_gib_with_three_digits(size, text):
    assert gib(size * 2**30) == text
