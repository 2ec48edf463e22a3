"""Adam on the host beside a GPU: copies on side streams lose no update, and the device's memory is free of its state.

Runs on a CPU too, with less in it: `pytest tests/gpu/test_host_adam.py -k cpu`.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.training import TrainingConfig
from qwench.training.batch import pack
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.optimizers.host_adam import HostAdam
from qwench.training.process_group import init_process_group
from tests.fakes.sections import adamw, offloaded
from tests.fakes.trainer import take_step

_DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param(
        "cuda",
        id="cuda",
        marks=[pytest.mark.gpu(1), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
_CONSTANTS = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
_ON_DEVICE = adamw(lr=1e-4)
_OFFLOADED = offloaded(_ON_DEVICE, 1.0, overlap=True)
_VOCAB = 512
_LENGTHS = (40, 7, 133, 64)
_PROMPT = 2


@pytest.fixture(scope="module", params=_DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    device = torch.device(request.param, 0 if request.param == "cuda" else None)
    init_process_group(device, environ={}, timeout_s=120)
    yield device
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    sizes = {"vocab_size": _VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    sizes["max_position_embeddings"] = 256  # a longer table of rotations would count
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _trained(device: torch.device, steps: int = 5, **options) -> tuple[HostAdam, list[Tensor]]:
    """Step five parameters of up to 2 M elements, with gradients that are only just computed when the step begins."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(1 << 21,), (700, 900), (3,), (1 << 20,), (129, 1001)]
    params = [torch.randn(shape, generator=draw).to(device, torch.bfloat16) for shape in shapes]
    optimizer = HostAdam(params, **_CONSTANTS, bucket_elements=1 << 18, **options)
    optimizer.reset()
    for step in range(steps):
        for param in params:
            noise = torch.randn(param.shape, generator=draw).to(device)
            param.decoupled_grad = (noise @ noise.T @ noise if noise.ndim == 2 else noise.sin().cos()) / (step + 1)
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_overlapping_copies_change_no_bit(device: torch.device, moments_dtype: torch.dtype) -> None:
    _, in_order = _trained(device, moment_dtypes=(moments_dtype, moments_dtype), overlap=False)
    for _ in range(3):
        optimizer, overlapped = _trained(device, moment_dtypes=(moments_dtype, moments_dtype), overlap=True)
        for param, expected in zip(overlapped, in_order, strict=True):
            assert torch.equal(param, expected)
            assert torch.equal(param.cpu(), optimizer.state[param]["master_param"].bfloat16())


@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_split_masters_are_stepped_as_whole_ones(device: torch.device, moments_dtype: torch.dtype) -> None:
    whole, params = _trained(device, offload_fraction=0.0, moment_dtypes=(moments_dtype, moments_dtype))
    halves, upper = _trained(device, offload_fraction=0.0, moment_dtypes=(moments_dtype, moments_dtype), splits_masters=True)
    for param, half in zip(params, upper, strict=True):
        # A moment that is rounded the other way moves a master by some 2^-9 of the learning rate in each step.
        within = 1e-6 if moments_dtype == torch.float32 else 5e-5
        torch.testing.assert_close(halves.master(half), whole.master(param).cpu(), rtol=1e-5, atol=within)
        assert torch.equal(half.cpu(), halves.master(half).bfloat16())


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_host_and_device_step_alike(device: torch.device, fraction: float) -> None:
    optimizer, params = _trained(device, offload_fraction=fraction)
    reference, expected = _trained(torch.device("cpu"), offload_fraction=1.0)
    for param, wanted in zip(params, expected, strict=True):
        # The gradients were computed on the device in float32, with its own order of sums.
        master = optimizer.state[param]["master_param"].cpu()
        torch.testing.assert_close(master, reference.state[wanted]["master_param"], rtol=1e-3, atol=1e-4)


def _build(folder: Path, device: torch.device, adam: OptimizerConfig) -> FsdpTrainer:
    training = TrainingConfig(gradient_checkpointing=True)
    return FsdpTrainer.build(
        folder, training=training, optimizer=adam, total_steps=1, param_dtype=torch.bfloat16, device=device
    )


def _micro_batches() -> list[MicroBatch]:
    draw = torch.Generator().manual_seed(0)
    batch = RolloutBatch(
        tokens=[torch.randint(_VOCAB, (length,), generator=draw) for length in _LENGTHS],
        loss_mask=[torch.ones(length - _PROMPT, dtype=torch.bool) for length in _LENGTHS],
        rewards=torch.zeros(len(_LENGTHS)),
        graded=torch.ones(len(_LENGTHS), dtype=torch.bool),
        group_ids=torch.zeros(len(_LENGTHS), dtype=torch.int64),
        execution_ids=torch.arange(len(_LENGTHS)),
    )
    return [pack(batch, [0, 3, 1]), pack(batch, [2])]


def _mean_loss(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    return TokenLoss(loss=-log_probs.sum() / (sum(_LENGTHS) - _PROMPT * len(_LENGTHS)), metrics={})


def _losses(backend: FsdpTrainer, steps: int) -> list[float]:
    return [take_step(backend, _micro_batches(), _mean_loss, temperature=1.0, with_entropy=False).loss for _ in range(steps)]


def test_an_offloaded_backend_trains_sleeps_and_resumes_as_one_on_the_device(
    model_folder: Path, device: torch.device, tmp_path: Path
) -> None:
    plain, offloaded = _build(model_folder, device, _ON_DEVICE), _build(model_folder, device, _OFFLOADED)
    expected = _losses(plain, steps=6)
    assert expected[-1] < expected[0] - 0.05
    assert _losses(offloaded, steps=3) == pytest.approx(expected[:3], rel=1e-3)
    offloaded.sleep()
    offloaded.wake()
    offloaded.save(tmp_path)
    assert _losses(offloaded, steps=3) == pytest.approx(expected[3:], rel=1e-3)
    resumed = _build(model_folder, device, replace(_OFFLOADED, optimizer_offload_fraction=0.5))
    resumed.load(tmp_path)
    assert _losses(resumed, steps=3) == pytest.approx(expected[3:], rel=1e-3)


@pytest.mark.parametrize("device", _DEVICES[1:], indirect=True)
def test_the_device_keeps_two_bytes_a_weight(model_folder: Path, device: torch.device) -> None:
    _losses(_build(model_folder, device, _ON_DEVICE), steps=1)  # cuBLAS takes its workspace
    # 2 of the weight, 2 of the rest of its master, 8 of moments; or the weight alone.
    for adam, bytes_a_weight in ((_ON_DEVICE, 12), (_OFFLOADED, 2)):
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        backend = _build(model_folder, device, adam)
        _losses(backend, steps=1)
        held = torch.cuda.memory_allocated(device) - before
        num_weights = sum(weight.numel() for bucket in backend.weights(bucket_bytes=1 << 24) for _, weight in bucket)
        assert held / num_weights == pytest.approx(bytes_a_weight, abs=1.0)
        del backend
