"""Frozen matrices in fewer bits: their error, and that training is that of a model whose weights are so rounded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from qwench.config.plan import _QUANTISED_BYTES
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.training import TrainingConfig
from qwench.training.frozen import FrozenMatrix
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from tests.contract.train_backend_cases import clipped_loss, make_batch, micro_batches, write_model
from tests.fakes.sections import adamw
from tests.fakes.trainer import take_step

pytestmark = pytest.mark.usefixtures("process_group")

_CPU = torch.device("cpu")
_LORA = LoraConfig(lora_rank=2, lora_alpha=4.0)


def test_nf4_keeps_its_levels_exactly():
    # Two blocks of 64; the largest magnitudes are 2 and 0.5.
    block = torch.tensor([1.0, -1.0, 0.0, 0.44070982933044434] * 16)
    weight = torch.stack((2 * block, 0.5 * block))
    matrix = FrozenMatrix(weight, "nf4")
    assert torch.equal(matrix.whole(torch.float32), weight)
    assert matrix.values.numel() == 64 and matrix.scales.tolist() == [2.0, 0.5]


def test_nf4_takes_the_nearest_level_and_pads_the_last_block():
    weight = torch.tensor([[1.0, 0.65, 0.63, -0.04], [0.0, 0.1, 0.2, -0.9]])
    expected = torch.tensor([[1.0, 0.7229568, 0.562617, 0.0], [0.0, 0.0795803, 0.1609302, -1.0]])
    torch.testing.assert_close(FrozenMatrix(weight, "nf4").whole(torch.float32), expected)


@pytest.mark.parametrize(("form", "least", "most"), [("fp8", 0.02, 0.03), ("nf4", 0.08, 0.1)])
def test_error_of_normal_weights_is_as_the_docs_state(form, least: float, most: float):
    weight = torch.randn((256, 384), generator=torch.Generator().manual_seed(3)) * 0.02
    error = (FrozenMatrix(weight, form).whole(torch.float32) - weight).norm() / weight.norm()
    assert least < float(error) < most


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_a_matrix_has_the_bytes_of_the_plan(form):
    matrix = FrozenMatrix(torch.ones(256, 384), form)
    assert matrix.values.nbytes + matrix.scales.nbytes == 256 * 384 * _QUANTISED_BYTES[form]


def test_the_gradient_is_that_of_the_dequantised_matrix():
    draw = torch.Generator().manual_seed(4)
    x, matrix = torch.randn((5, 96), generator=draw, requires_grad=True), torch.randn((40, 96), generator=draw)
    frozen = FrozenMatrix(matrix, "nf4")
    upstream = torch.randn((5, 40), generator=draw)
    (gradient,) = torch.autograd.grad(frozen(x), x, upstream)
    torch.testing.assert_close(gradient, upstream @ frozen.whole(torch.float32))


def _trainer(folder: Path, lora: LoraConfig, *, recomputes: bool = False) -> FsdpTrainer:
    return FsdpTrainer.build(
        folder,
        training=TrainingConfig(gradient_checkpointing=recomputes),
        optimizer=adamw(lr=1e-2),
        total_steps=9,
        param_dtype=torch.float32,
        device=_CPU,
        lora=lora,
    )


def _published(trainer: FsdpTrainer, part="merged") -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in trainer.weights(bucket_bytes=1 << 20, part=part) for name, tensor in bucket}


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_training_equals_that_of_a_model_with_rounded_weights(tmp_path: Path, form, recomputes: bool):
    write_model(tmp_path / "model", tied=True)
    rounded = Qwen3ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if name.endswith("_proj.weight"):
                weight.copy_(FrozenMatrix(weight, form).whole(torch.float32))
    rounded.save_pretrained(tmp_path / "rounded")
    trainer = _trainer(tmp_path / "model", replace(_LORA, lora_base=form), recomputes=recomputes)
    plain = _trainer(tmp_path / "rounded", _LORA)
    batch = micro_batches(make_batch(), [[0, 1, 2], [3, 4, 5, 6, 7]])
    for _ in range(3):
        one, other = (take_step(each, batch, clipped_loss, temperature=1.0, with_entropy=True) for each in (trainer, plain))
        assert one.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-6)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    mine, theirs = _published(trainer), _published(plain)
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=1e-5)
    assert _published(trainer, "apart").keys() == _published(plain, "apart").keys()


@pytest.mark.parametrize("form", [None, "fp8", "nf4"])
def test_another_matrix_has_the_place_inside_the_context_alone(form):
    matrix, other = FrozenMatrix(torch.ones(4, 128), form), torch.full((4, 128), 2.0)
    before, x = matrix.whole(torch.float32), torch.ones(1, 128)
    with pytest.raises(KeyError), matrix.replaced(other):
        assert torch.equal(matrix(x), torch.full((1, 4), 256.0))
        assert matrix.whole(torch.bfloat16).dtype == torch.bfloat16
        raise KeyError
    assert torch.equal(matrix.whole(torch.float32), before)
