"""Adapters on one rank, in this process: precision, dropout, the start, and the folders that a run goes on from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from qwench.algorithms.columns import MicroBatch, TokenLoss
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.training.adapters import AdapterSwitch
from qwench.training.fsdp.adapted import AdaptedPolicy
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.reference import Reference
from tests.contract.train_backend_cases import clipped_loss, make_batch, micro_batches, write_model
from tests.fakes.sections import adamw, offloaded
from tests.fakes.trainer import take_step

pytestmark = pytest.mark.usefixtures("process_group")

_CPU = torch.device("cpu")
_ADAM = adamw(lr=1e-2)
_LORA = LoraConfig(lora_rank=2, lora_alpha=4.0)
_PISSA = replace(_LORA, lora_init="pissa")
_DROPS = replace(_LORA, lora_dropout=0.25)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, tied=False)
    return folder


def _build(
    folder: Path,
    lora: LoraConfig,
    *,
    dtype: torch.dtype = torch.float32,
    recomputes: bool = False,
    adam: OptimizerConfig = _ADAM,
) -> FsdpTrainer:
    return FsdpTrainer.build(
        folder,
        training=TrainingConfig(gradient_checkpointing=recomputes),
        optimizer=adam,
        total_steps=9,
        param_dtype=dtype,
        device=_CPU,
        lora=lora,
    )


def _batch() -> list[MicroBatch]:
    return micro_batches(make_batch(), [[6, 1], [7, 3, 0, 5], [2, 4]])


def _loss(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    return clipped_loss(log_probs, entropy, micro_batch)


def _train(trainer: FsdpTrainer, steps: int) -> list[float]:
    return [take_step(trainer, _batch(), _loss, temperature=1.0, with_entropy=True).loss for _ in range(steps)]


def _published(trainer: FsdpTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in trainer.weights(bucket_bytes=1 << 20) for name, tensor in bucket}


def _saved(trainer: FsdpTrainer, folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    trainer.save(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("lora", [_LORA, _PISSA], ids=["kaiming", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_run_publishes_and_computes_the_base_model(model_folder: Path, lora: LoraConfig, dtype: torch.dtype):
    trainer, base = _build(model_folder, lora, dtype=dtype), Qwen3ForCausalLM.from_pretrained(model_folder, dtype=dtype)
    published = _published(trainer)
    assert published.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(published[name], weight) for name, weight in base.named_parameters())
    scored = trainer.forward(_batch(), temperature=1.0).log_probs
    with trainer.without_adapters():
        frozen = trainer.forward(_batch(), temperature=1.0).log_probs
    assert all(torch.equal(*pair) for pair in zip(scored, frozen, strict=True))


def test_bfloat16_weights_are_published_as_the_sum_of_rounded_factors_rounded_once(model_folder: Path, tmp_path: Path):
    trainer = _build(model_folder, _LORA, dtype=torch.bfloat16)
    frozen = _published(trainer)
    _train(trainer, 2)
    published, saved = _published(trainer), _saved(trainer, tmp_path / "saved")
    name = "model.layers.1.mlp.up_proj"
    a, b = (saved[f"base_model.model.{name}.lora_{leaf}.weight"] for leaf in "AB")
    assert a.dtype == torch.float32 and not torch.equal(a, a.bfloat16().float())  # masters
    expected = frozen[f"{name}.weight"].double() + 2.0 * b.bfloat16().double() @ a.bfloat16().double()
    assert published[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(published[f"{name}.weight"], expected.bfloat16())
    assert not torch.equal(published[f"{name}.weight"], frozen[f"{name}.weight"])
    untouched = [key for key in published if "_proj" not in key]
    assert all(torch.equal(published[key], frozen[key]) for key in untouched)
    assert trainer.shared_weights() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_whose_masters_are_on_the_host_learn_the_same_bits(model_folder: Path, tmp_path: Path, dtype: torch.dtype):
    device = _build(model_folder, _PISSA, dtype=dtype)
    host = _build(model_folder, _PISSA, dtype=dtype, adam=offloaded(_ADAM, 1.0))
    assert _train(device, 3) == _train(host, 3)
    one, other = _saved(device, tmp_path / "device"), _saved(host, tmp_path / "host")
    assert all(torch.equal(matrix, other[name]) for name, matrix in one.items())


def test_adapters_with_moments_in_8_bits_learn_nearly_the_same_and_resume_exactly(model_folder: Path, tmp_path: Path):
    eighth = replace(_ADAM, optimizer="adam8bit")
    trainer, exact = _build(model_folder, _LORA, adam=eighth), _build(model_folder, _LORA)
    assert _train(trainer, 3) == pytest.approx(_train(exact, 3), rel=2e-2)
    _saved(trainer, tmp_path / "saved")
    resumed = _build(model_folder, _LORA, adam=eighth)
    resumed.load(tmp_path / "saved")
    assert _train(resumed, 2) == _train(trainer, 2)


@pytest.mark.parametrize("recomputes", [False, True])
def test_one_rank_computes_plain_adapters_without_fsdp_as_the_module_does(
    model_folder: Path, recomputes: bool, monkeypatch: pytest.MonkeyPatch
):
    lora = replace(_LORA, target_modules="q_proj,v_proj,up_proj,down_proj")
    direct = _build(model_folder, lora, recomputes=recomputes)
    monkeypatch.setattr("qwench.training.fsdp.lora.Adapters.are_plain", False)
    module = _build(model_folder, lora, recomputes=recomputes)
    assert isinstance(direct._policy, AdaptedPolicy) and not isinstance(module._policy, AdaptedPolicy)
    assert _train(direct, 4) == pytest.approx(_train(module, 4), rel=1e-5)
    one, other = _published(direct), _published(module)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [_LORA, _PISSA, replace(_LORA, lora_base="nf4")], ids=["plain", "pissa", "nf4"])
def test_frozen_weights_are_shared_where_they_are_held_as_published(model_folder: Path, lora: LoraConfig):
    trainer = _build(model_folder, lora)
    assert trainer.shared_weights() is None
    shared = trainer.shared_weights("apart")
    if lora.lora_base == "nf4":
        assert shared is None
        return
    assert shared is not None
    before = {name: weight.clone() for name, weight in shared.items()}
    _train(trainer, 1)
    base = dict(Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32).named_parameters())
    assert shared.keys() == base.keys()
    assert all(torch.equal(weight, base[name]) and torch.equal(weight, before[name]) for name, weight in shared.items())
    again = trainer.shared_weights("apart")
    assert again is not None and all(again[name].data_ptr() == weight.data_ptr() for name, weight in shared.items())


def test_a_pass_drops_a_share_of_inputs_and_scales_up_the_others():
    switch, x = AdapterSwitch(0.25, seed=1), torch.ones(200, 100)
    assert switch.dropped(x, 3) is x  # scoring drops nothing
    switch.drop(step=0, micro_batch=0, rank=0)
    dropped = switch.dropped(x, 3)
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropped, switch.dropped(x, 3))
    assert not torch.equal(dropped, switch.dropped(x, 4))


def test_layers_that_are_computed_again_drop_the_same_inputs(model_folder: Path):
    kept, again = _build(model_folder, _DROPS), _build(model_folder, _DROPS, recomputes=True)
    losses = _train(kept, 3)
    assert _train(again, 3) == losses
    without = _train(_build(model_folder, _LORA), 3)
    assert losses[0] == pytest.approx(without[0], rel=1e-5)  # B is zero; the kernels of the two differ
    assert losses[2] != without[2]


@pytest.mark.parametrize("lora", [_DROPS, replace(_PISSA, lora_dropout=0.25, use_rslora=True)], ids=["kaiming", "pissa"])
def test_a_resumed_run_has_the_bits_of_one_that_went_on(model_folder: Path, tmp_path: Path, lora: LoraConfig):
    whole, first = _build(model_folder, lora), _build(model_folder, lora)
    _train(whole, 5)
    _train(first, 2)
    _saved(first, tmp_path / "two")
    torch.manual_seed(99)  # what is dropped follows from the step, not from the state of a generator
    resumed = _build(model_folder, lora)
    resumed.load(tmp_path / "two")
    _train(resumed, 3)
    one, other = _saved(whole, tmp_path / "whole"), _saved(resumed, tmp_path / "resumed")
    assert one.keys() == other.keys()
    assert all(torch.equal(matrix, other[name]) for name, matrix in one.items())
    published = _published(resumed)
    assert all(torch.equal(tensor, published[name]) for name, tensor in _published(whole).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [_LORA, _PISSA], ids=["kaiming", "pissa"])
def test_a_moving_reference_is_a_copy_of_the_adapters(model_folder: Path, tmp_path: Path, lora: LoraConfig, dtype: torch.dtype):
    trainer, undisturbed = _build(model_folder, lora, dtype=dtype), _build(model_folder, lora, dtype=dtype)
    assert _train(trainer, 2) == _train(undisturbed, 2)
    scored = trainer.forward(_batch(), temperature=1.0).log_probs
    reference = Reference(trainer)
    assert _train(trainer, 2) == _train(undisturbed, 2)
    assert all(torch.equal(*pair) for pair in zip(reference.forward(_batch(), temperature=1.0).log_probs, scored, strict=True))
    reference.save(tmp_path)
    assert _train(trainer, 1) == _train(undisturbed, 1)  # masters are as they were
    resumed = Reference(_build(model_folder, lora, dtype=dtype))
    resumed.load(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(resumed.forward(_batch(), temperature=1.0).log_probs, scored, strict=True))


def test_principal_components_are_saved_as_one_adapter_of_twice_the_rank(model_folder: Path, tmp_path: Path):
    trainer = _build(model_folder, _PISSA)
    _train(trainer, 2)
    saved, published = _saved(trainer, tmp_path / "saved"), _published(trainer)
    base = Qwen3ForCausalLM.from_pretrained(model_folder)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        a, b = (saved[f"base_model.model.{name}.lora_{leaf}.weight"] for leaf in "AB")
        assert a.shape[0] == b.shape[1] == 4
        expected = base.get_parameter(f"{name}.weight") + 2.0 * b @ a
        torch.testing.assert_close(published[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    continued = _build(model_folder, replace(_LORA, lora_rank=4, lora_alpha=8.0, lora_adapter_path=tmp_path / "saved"))
    for name, tensor in _published(continued).items():
        torch.testing.assert_close(tensor, published[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (replace(_LORA, lora_rank=3), "has rank 2, this run 3; give --lora-rank 2"),
        (replace(_PISSA, lora_rank=2), "has rank 2, this run 4; give --lora-rank 2 --lora-init kaiming"),
        (replace(_LORA, lora_alpha=8.0), "has the scale 2, this run 4; give --lora-alpha 4"),
        (replace(_LORA, use_rslora=True), "has the scale 2, this run 2.82843; give --lora-alpha 2.82842712475"),
        (
            replace(_LORA, target_modules="q_proj"),
            "has the projections q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj, this run q_proj; "
            "give --target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        ),
    ],
)
def test_an_adapter_of_other_flags_is_refused(model_folder: Path, tmp_path: Path, lora: LoraConfig, message: str):
    _saved(_build(model_folder, _LORA), tmp_path / "saved")
    with pytest.raises(ConfigError, match=f"^the adapter {tmp_path / 'saved'} {message}"):
        _build(model_folder, replace(lora, lora_adapter_path=tmp_path / "saved"))


def test_an_adapter_of_another_model_and_whole_weights_are_refused(model_folder: Path, tmp_path: Path):
    trainer = _build(model_folder, _LORA)
    _saved(trainer, tmp_path / "saved")
    write_model(tmp_path / "deeper", tied=True, num_layers=3)
    with pytest.raises(ConfigError, match=r"is of another model: model\.layers\.2"):
        _build(tmp_path / "deeper", replace(_LORA, lora_adapter_path=tmp_path / "saved"))
    with pytest.raises(CheckpointError, match="holds no adapter; give whole weights as --ref-load or --hf-checkpoint"):
        trainer.load(model_folder, weights_only=True)


def test_adapters_are_stepped_by_eight_bits_as_by_adam(model_folder: Path) -> None:
    first = {}
    for optimizer in ("adam", "adam8bit"):
        trainer = _build(model_folder, _LORA, adam=replace(_ADAM, optimizer=optimizer))
        _train(trainer, 1)
        first[optimizer] = _published(trainer)
    for name, weight in first["adam"].items():  # the first step is the sign of the gradient, whatever holds the moments
        torch.testing.assert_close(first["adam8bit"][name], weight, rtol=1e-3, atol=1e-5)
