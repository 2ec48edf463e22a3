"""What an engine holds between publications: own copies, aliases of the trainer's tensors, or nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwench.engines.embedded.compute.weights import SCALE, TIED_HEAD, WeightStore
from qwench.engines.protocol import Portion
from qwench.errors import WeightSyncError
from qwench.models.peft import A, B
from tests.unit.config.architectures import QWEN3_4B

MODEL = replace(
    QWEN3_4B, num_layers=1, hidden_size=8, ffn_hidden_size=12, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=16
)
Q = "model.layers.0.self_attn.q_proj"
ADAPTER = {f"{Q}.{A}": torch.ones(2, 8), f"{Q}.{B}": torch.ones(8, 2), SCALE: torch.tensor([0.5])}


def store() -> WeightStore:
    assert MODEL.tied_head
    return WeightStore(MODEL, torch.float32, fp8=False, device=torch.device("cpu"))


def weights_of(value: float) -> dict[str, Tensor]:
    return {name: torch.full(shape, value) for name, shape in MODEL.parameter_shapes().items()}


def test_aliases_are_the_trainers_tensors_and_are_never_written_into():
    held, trained = store(), weights_of(1.0)
    assert not held.ready and not held.tensors
    held.adopt(trained | {TIED_HEAD: torch.zeros(16, 8)})
    assert held.ready and held.layout == 1
    assert {name: tensor.data_ptr() for name, tensor in held.tensors.items()} == {
        name: tensor.data_ptr() for name, tensor in trained.items()
    }
    held.adopt(trained)
    assert held.layout == 1, "nothing has moved"
    held.load([list(weights_of(2.0).items())])
    assert held.layout == 2 and all(bool((tensor == 2).all()) for tensor in held.tensors.values())
    assert all(bool((tensor == 1).all()) for tensor in trained.values())
    held.load([list(weights_of(3.0).items())])
    assert held.layout == 2, "own memory is kept"
    held.drop()
    assert (held.ready, held.tensors, held.layout) == (False, {}, 3)


def test_weights_are_ready_when_all_have_come_and_their_checksums_are_returned():
    held, weights = store(), weights_of(1.0)
    (first, rest) = list(weights.items())[:1], list(weights.items())[1:]
    assert held.take(first, Portion(version=4, index=0, final=False)) is None
    assert not held.ready
    checksums = held.take([*rest, (TIED_HEAD, weights["model.embed_tokens.weight"])], Portion(version=4, index=1, final=True))
    assert held.ready and checksums is not None
    assert checksums.keys() == {*weights, TIED_HEAD} and checksums[TIED_HEAD] == checksums["model.embed_tokens.weight"]
    assert held.take(list(weights.items()), Portion(version=5, index=0, final=True)) == {
        name: number for name, number in checksums.items() if name != TIED_HEAD
    }


def test_a_bucket_out_of_turn_is_refused():
    held, bucket = store(), list(weights_of(1.0).items())[:1]
    held.take(bucket, Portion(version=4, index=0, final=False))
    for version, index in ((4, 2), (5, 1)):
        with pytest.raises(
            WeightSyncError, match=rf"bucket {index} of weight version {version} arrived when bucket 1 of version 4"
        ):
            held.take(bucket, Portion(version=version, index=index, final=False))
    held.take(bucket, Portion(version=5, index=0, final=False))  # another publication may begin at any time


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model.norm.weight": torch.zeros(9)}, "weight 'model.norm.weight' has shape (9,); the engine's model wants (8,)."),
        ({"other": torch.zeros(1)}, "the engine's model has no weight 'other'; the trainer's model is another one."),
        ({f"{Q}.weight_scale_inv": torch.zeros(1)}, f"weight '{Q}.weight_scale_inv' is in FP8, and this engine's model is not"),
        (
            {f"{Q}.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn)},
            f"weight '{Q}.weight' came as torch.float8_e4m3fn; the engine holds it as torch.float32.",
        ),
    ],
)
def test_a_tensor_of_another_model_is_refused_and_what_is_held_stays(change, problem):
    held = store()
    held.load([list(weights_of(1.0).items())])
    with pytest.raises(WeightSyncError, match=re.escape(problem)):
        held.load([list((weights_of(2.0) | change).items())])
    assert held.ready and bool((held.tensors["model.norm.weight"] == 1).all())
    if "other" not in change and f"{Q}.weight_scale_inv" not in change:
        with pytest.raises(WeightSyncError, match=re.escape(problem)):
            held.adopt(weights_of(1.0) | change)


def test_what_cannot_be_aliased_or_did_not_arrive_is_named():
    held, weights = store(), weights_of(1.0)
    with pytest.raises(WeightSyncError, match=r"weight 'model\.norm\.weight' cannot be aliased: it is torch\.bfloat16 on cpu"):
        held.adopt(weights | {"model.norm.weight": torch.zeros(8, dtype=torch.bfloat16)})
    with pytest.raises(WeightSyncError, match="the engine's model has no weight 'other'"):
        held.adopt(weights | {"other": torch.zeros(1)})
    names = list(weights)
    for missing, listed in ((1, names[0]), (4, f"{', '.join(names[:3])} ...")):
        with pytest.raises(
            WeightSyncError,
            match=f"^{missing} of {len(names)} weights did not arrive: {re.escape(listed)}; publish all of them",
        ):
            held.load([list(weights.items())[missing:]])
        with pytest.raises(WeightSyncError, match=f"^{missing} of {len(names)} weights did not arrive: "):
            held.adopt(dict(list(weights.items())[missing:]))
        assert not held.ready


def test_an_adapter_may_come_with_weights_or_alone_and_goes_with_the_next_weights():
    held = store()
    with pytest.raises(WeightSyncError, match="weights did not arrive"):
        held.load([list(ADAPTER.items())])
    held.load([[*weights_of(1.0).items(), *ADAPTER.items()]])
    assert held.ready and held.adapters.choose(None).slot == 1
    assert held.load([list(ADAPTER.items())]).keys() == ADAPTER.keys()
    assert held.ready and held.adapters.mix(torch.tensor([1])).tolist() == [[0.5]]
    held.load([list(weights_of(2.0).items())])
    assert held.adapters.choose(None).slot == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({SCALE: torch.ones(2)}, f"an adapter came without '{SCALE}', the one number by which it is multiplied."),
        ({f"{Q}.{B}": torch.ones(7, 2)}, "the adapter cannot be used: "),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(change, problem):
    held = store()
    with pytest.raises(WeightSyncError, match=re.escape(problem)):
        held.load([[*weights_of(1.0).items(), *(ADAPTER | change).items()]])
    assert not held.ready
