"""The written-out decoder against autograd through the Hugging Face module, one sequence at a time."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of
from qwench.training.fsdp.direct import FlatGradients, FlatTensors
from qwench.training.memory_budget import kept_bytes
from qwench.training.packed_decoder import Keep, PackedDecoder, Sequences
from qwench.training.sequence_attention import attention_of

_CPU = torch.device("cpu")
_LENGTHS = [5, 9, 1, 30]
_SCORED = torch.tensor([0, 1, 3, 6, 9, 13, 14, 17, 40])


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


def _model(*, tied: bool, rope: dict[str, object] | None = None) -> Qwen3ForCausalLM:
    """Return a model whose weights are bfloat16 numbers in float32, so that both precisions start from the same."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=tied, rope_parameters=rope))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = weight.uniform_(0.5, 1.5) if name.endswith("norm.weight") else weight.mul_(5)
            weight.copy_(drawn.bfloat16().float())
    return model


def _tokens() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(32, (length,), generator=draw) for length in _LENGTHS]


def _slopes() -> Tensor:
    return torch.randn(len(_SCORED), 16, generator=torch.Generator().manual_seed(2)).bfloat16()


def _of_autograd(model: Qwen3ForCausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    hidden = torch.cat([model.model(tokens[None]).last_hidden_state[0] for tokens in _tokens()])[_SCORED]
    (hidden.float() * _slopes().float()).sum().backward()
    found = {name: weight.grad.float() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return hidden.detach(), found


def _written_out(
    model: Qwen3ForCausalLM, architecture: Architecture, dtype: torch.dtype, keep: Keep
) -> tuple[Tensor, dict[str, Tensor]]:
    weights, sums = FlatTensors(architecture, dtype, _CPU), FlatTensors(architecture, torch.float32, _CPU)
    for name, weight in model.named_parameters():
        weights.by_name[name].copy_(weight.detach())
    sequences = Sequences(
        tokens=torch.cat(_tokens()),
        positions=torch.cat([torch.arange(length) for length in _LENGTHS]),
        scored=_SCORED,
        attention=attention_of("sdpa", _LENGTHS, _CPU),
    )
    decoder = PackedDecoder(architecture, _CPU, invariant=False)
    hidden, forward = decoder.forward(weights.bound, sequences, keep)
    assert forward is not None
    decoder.backward(weights.bound, sums.bound, forward, _slopes().to(dtype))
    return hidden, sums.by_name


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("tied", "rope"), [(True, None), (False, None), (True, _YARN)], ids=["tied", "untied", "yarn"])
@pytest.mark.parametrize("keep", list(Keep))
def test_float32_equals_autograd_whatever_is_kept(keep: Keep, tied: bool, rope: dict[str, object] | None) -> None:
    model = _model(tied=tied, rope=rope)
    hidden, wanted = _of_autograd(model)
    got_hidden, got = _written_out(model, architecture_of(model.config), torch.float32, keep)
    torch.testing.assert_close(got_hidden, hidden, rtol=1e-5, atol=1e-5)
    assert len(wanted) == 3 * 11 + 2
    for name, gradient in wanted.items():
        assert _error(got[name], gradient) < 1e-5, name


def test_bfloat16_is_as_near_to_float32_as_the_module_in_bfloat16() -> None:
    model = _model(tied=True)
    _, wanted = _of_autograd(model)
    module = _model(tied=True)
    for weight in module.parameters():  # not module.bfloat16(): that would round the rotary frequencies too
        weight.data = weight.data.bfloat16()
    _, rounded = _of_autograd(module)
    _, got = _written_out(model, architecture_of(model.config), torch.bfloat16, Keep.ALL)
    assert max(_error(got[name], wanted[name]) for name in wanted) < 1.5 * max(
        _error(rounded[name], wanted[name]) for name in wanted
    )


@pytest.mark.parametrize("keep", list(Keep))
def test_a_forward_keeps_the_bytes_that_the_budget_counts(keep: Keep) -> None:
    architecture = architecture_of(_model(tied=True).config)
    weights = FlatTensors(architecture, torch.bfloat16, _CPU)
    count = sum(_LENGTHS)
    sequences = Sequences(
        tokens=torch.zeros(count, dtype=torch.int64),
        positions=torch.arange(count),
        scored=_SCORED,
        attention=attention_of("sdpa", [count], _CPU),
    )
    _, forward = PackedDecoder(architecture, _CPU, invariant=False).forward(weights.bound, sequences, keep)
    assert forward is not None
    kept = 0
    for layer in forward.layers:
        parts = [getattr(layer, field.name) for field in fields(layer) if field.name != "attention_state"]
        tensors = [one for part in parts for one in (part if isinstance(part, tuple) else [part])]
        kept += sum(one.nbytes for one in tensors if one is not None)
        assert (layer.attention_state is None) == (keep is Keep.NOTHING)
    log_sums = 0 if keep is Keep.NOTHING else 3 * count * 4 * 4  # of 4 heads in 3 layers; they are in the attention's state
    assert kept + log_sums == kept_bytes(architecture, count, keep, torch.bfloat16)


def test_recomputing_gives_the_same_bits() -> None:
    model = _model(tied=True)
    architecture = architecture_of(model.config)
    kept, *others = (_written_out(model, architecture, torch.bfloat16, keep)[1] for keep in Keep)
    for other in others:
        assert all(torch.equal(kept[name], other[name]) for name in kept)


def test_sums_of_gradients_keep_their_tensors_give_their_memory_back_and_begin_at_zero() -> None:
    architecture = architecture_of(_model(tied=True).config)
    gradients = FlatGradients(lambda: FlatTensors(architecture, torch.float32, _CPU))
    sums = gradients.sums
    assert sums.layers[1].gate_up.shape == (48, 16)
    sums.layers[1].gate_up.fill_(3.0)
    assert sum(float(one.sum()) for one in gradients.local()) == 3 * 48 * 16
    gradients.drop()
    assert sums.head.untyped_storage().nbytes() == 0
    assert gradients.sums is sums
    assert all(bool((one == 0).all()) for one in gradients.local())
    assert sums.layers[1].gate_up.shape == (48, 16)
