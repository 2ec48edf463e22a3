"""Masters and moments on the host, on one rank in this process: the same numbers as on the device, to the bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.training import TrainingConfig
from qwench.training.batch import pack
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.reference import Reference
from tests.fakes.sections import adamw, offloaded
from tests.fakes.trainer import take_step
from tests.unit.training.fsdp.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("process_group")

_CPU = torch.device("cpu")
_BF16 = torch.bfloat16
_BF16_MOMENTS = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
_ON_DEVICE = adamw(clip_grad=0.5)
_OFFLOADED = offloaded(_ON_DEVICE, 1.0)
_VARIANTS = {
    "all": _OFFLOADED,
    "half": offloaded(_ON_DEVICE, 0.5),
    "overlapped": offloaded(_ON_DEVICE, 1.0, overlap=True),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    tiny_model().to(_BF16).save_pretrained(folder)
    return folder


def _build(folder: Path, adam: OptimizerConfig, dtype: torch.dtype = _BF16) -> FsdpTrainer:
    return FsdpTrainer.build(folder, training=TrainingConfig(), optimizer=adam, total_steps=1, param_dtype=dtype, device=_CPU)


def _micro_batches() -> list[MicroBatch]:
    draw = torch.Generator().manual_seed(0)
    batch = RolloutBatch(
        tokens=[torch.randint(32, (length,), generator=draw) for length in (6, 9, 4)],
        loss_mask=[torch.ones(length - 2, dtype=torch.bool) for length in (6, 9, 4)],
        rewards=torch.zeros(3),
        graded=torch.ones(3, dtype=torch.bool),
        group_ids=torch.zeros(3, dtype=torch.int64),
        execution_ids=torch.arange(3),
    )
    return [pack(batch, [0, 2]), pack(batch, [1])]


def _mean_loss(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    return TokenLoss(loss=-log_probs.sum() / 13, metrics={})


def _train(backend: FsdpTrainer, steps: int) -> list[tuple[float, float]]:
    results = [take_step(backend, _micro_batches(), _mean_loss, temperature=1.0, with_entropy=False) for _ in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


def _published(backend: FsdpTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for bucket in backend.weights(bucket_bytes=1 << 20) for name, tensor in bucket}


def _masters(backend: FsdpTrainer) -> dict[str, Tensor]:
    return {name: _whole(master).clone() for name, master in backend._optimizer.masters().items()}


def _whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) and tensor.dtype == right[name].dtype for name, tensor in left.items())


@pytest.mark.parametrize("adam", _VARIANTS.values(), ids=_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, _BF16], ids=["float32", "bfloat16"])
def test_offloading_changes_no_bit(model_folder: Path, adam: OptimizerConfig, dtype: torch.dtype):
    plain, offloaded = _build(model_folder, _ON_DEVICE, dtype), _build(model_folder, adam, dtype)
    assert _train(offloaded, steps=4) == _train(plain, steps=4)
    _assert_equal(_masters(offloaded), _masters(plain))
    _assert_equal(_published(offloaded), _published(plain))


def test_masters_begin_as_the_weights_and_keep_what_bfloat16_would_lose(model_folder: Path):
    backend = _build(model_folder, replace(_OFFLOADED, lr=2e-6))
    before = _published(backend)
    _assert_equal(_masters(backend), {name: weight.float() for name, weight in before.items()})
    _train(backend, steps=3)
    masters, after = _masters(backend), _published(backend)
    name = "model.layers.0.mlp.up_proj.weight"
    large = before[name].abs() > 0.01
    assert torch.equal(after[name][large], before[name][large])
    assert (masters[name] != before[name].float()).all()
    _assert_equal({name: master.to(_BF16) for name, master in masters.items()}, after)


@pytest.mark.parametrize("moments_dtype", [torch.float32, _BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_checkpoint_goes_on_bit_for_bit(model_folder: Path, tmp_path: Path, fraction: float, moments_dtype: torch.dtype):
    adam = replace(offloaded(_ON_DEVICE, fraction), **(_BF16_MOMENTS if moments_dtype == _BF16 else {}))
    backend = _build(model_folder, adam)
    _train(backend, steps=2)
    backend.save(tmp_path)
    onward = _train(backend, steps=2)
    resumed = _build(model_folder, adam)
    resumed.load(tmp_path)
    assert _train(resumed, steps=2) == onward
    _assert_equal(_masters(resumed), _masters(backend))


def test_a_checkpoint_moves_between_host_and_device(model_folder: Path, tmp_path: Path):
    backend = _build(model_folder, _OFFLOADED)
    _train(backend, steps=2)
    backend.save(tmp_path / "offloaded")
    onward = _train(backend, steps=2)
    on_device = _build(model_folder, _ON_DEVICE)
    on_device.load(tmp_path / "offloaded")
    on_device.save(tmp_path / "on_device")
    assert _train(on_device, steps=2) == onward
    back = _build(model_folder, _OFFLOADED)
    back.load(tmp_path / "on_device")
    assert _train(back, steps=2) == onward
    _assert_equal(_masters(back), _masters(backend))


def test_weights_that_are_loaded_alone_become_the_masters_of_a_fresh_optimizer(model_folder: Path, tmp_path: Path):
    backend = _build(model_folder, _ON_DEVICE)
    _train(backend, steps=2)
    backend.save(tmp_path)
    fresh = _build(model_folder, _OFFLOADED)
    fresh.load(tmp_path, weights_only=True)
    _assert_equal(_masters(fresh), _masters(backend))
    _assert_equal(_published(fresh), _published(backend))
    assert fresh._optimizer.num_steps == 0


def test_the_reference_does_not_disturb_masters_on_the_host(model_folder: Path):
    backend, undisturbed = _build(model_folder, _OFFLOADED), _build(model_folder, _OFFLOADED)
    reference_model = Reference(backend)
    first = backend.forward(_micro_batches(), temperature=1.0).log_probs
    assert _train(backend, steps=2) == _train(undisturbed, steps=2)
    assert all(map(torch.equal, reference_model.forward(_micro_batches(), temperature=1.0).log_probs, first))
    assert _train(backend, steps=2) == _train(undisturbed, steps=2)
    _assert_equal(_masters(backend), _masters(undisturbed))


@pytest.mark.parametrize("adam", [_ON_DEVICE, _OFFLOADED], ids=["on device", "on host"])
def test_a_saved_reference_is_not_the_policy(model_folder: Path, tmp_path: Path, adam: OptimizerConfig):
    backend = _build(model_folder, adam)
    reference = _published(backend)
    reference_model = Reference(backend)
    _train(backend, steps=2)
    policy = _published(backend)
    reference_model.save(tmp_path)
    fresh = _build(model_folder, adam)
    fresh.load(tmp_path, weights_only=True)
    _assert_equal(_published(fresh), reference)
    _assert_equal(_published(backend), policy)
    assert any(not torch.equal(policy[name], weight) for name, weight in reference.items())


def test_bfloat16_moments_change_the_steps_but_little(model_folder: Path):
    plain, rounded = (
        _build(model_folder, _ON_DEVICE),
        _build(model_folder, replace(_ON_DEVICE, **_BF16_MOMENTS)),
    )
    _train(plain, steps=8)
    _train(rounded, steps=8)
    moments = rounded._optimizer.moments()
    assert all(moment.dtype == _BF16 for moment in moments.values())
    for name, master in _masters(rounded).items():
        moved = (master - _masters(plain)[name]).abs().max()
        # Eight steps of at most 1e-3 each, whose moments are rounded by 2^-9.
        assert 0 < moved < 8e-3 * 2**-4


def test_the_device_holds_no_optimizer_state_besides_bfloat16_weights(model_folder: Path):
    backend = _build(model_folder, _OFFLOADED)
    _train(backend, steps=1)
    assert backend._optimizer.device_state() == []
    assert all(weight.dtype == _BF16 for weight in backend._weights.values())
    assert all(weight.grad is None for weight in backend._weights.values())
