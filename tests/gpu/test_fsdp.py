"""The FSDP2 backend in bfloat16 on one GPU: the attention kernels, compilation, and memory that is lent and taken back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.config.sections.training import TrainingConfig
from qwench.training import offload
from qwench.training.batch import pack, unpack
from qwench.training.fsdp.fsdp_trainer import WHOLE_GRADIENT_BYTES, FsdpTrainer
from qwench.training.process_group import init_process_group
from qwench.training.reference import Reference
from tests.fakes.sections import adamw
from tests.fakes.trainer import take_step

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

_LENGTHS = (40, 7, 133, 64, 1 + 2, 96)
_PROMPT = 2
_VOCAB = 2048


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    device = torch.device("cuda", 0)
    init_process_group(device, environ={}, timeout_s=120)
    yield device
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    sizes = {"vocab_size": _VOCAB, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _build(
    folder: Path, device: torch.device, *, attention: str = "sdpa", whole_gradient_bytes: int = WHOLE_GRADIENT_BYTES, **training
) -> FsdpTrainer:
    return FsdpTrainer.build(
        folder,
        training=TrainingConfig(log_probs_chunk_size=100, **training),
        optimizer=adamw(lr=1e-4),
        total_steps=1,
        param_dtype=torch.bfloat16,
        device=device,
        attention=attention,
        whole_gradient_bytes=whole_gradient_bytes,
    )


def _batch() -> RolloutBatch:
    draw = torch.Generator().manual_seed(0)
    return RolloutBatch(
        tokens=[torch.randint(_VOCAB, (length,), generator=draw) for length in _LENGTHS],
        loss_mask=[torch.ones(length - _PROMPT, dtype=torch.bool) for length in _LENGTHS],
        rewards=torch.zeros(len(_LENGTHS)),
        graded=torch.ones(len(_LENGTHS), dtype=torch.bool),
        group_ids=torch.zeros(len(_LENGTHS), dtype=torch.int64),
        execution_ids=torch.arange(len(_LENGTHS)),
    )


def _micro_batches() -> list[MicroBatch]:
    return [pack(_batch(), [0, 3, 1]), pack(_batch(), [2, 5, 4])]


def _mean_loss(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    num_trained = sum(_LENGTHS) - _PROMPT * len(_LENGTHS)
    assert entropy is not None
    loss = -(log_probs + 0.01 * entropy).sum() / num_trained
    return TokenLoss(loss=loss, metrics={"entropy": entropy.detach().sum() / num_trained})


def _train(backend: FsdpTrainer, steps: int) -> list[float]:
    return [take_step(backend, _micro_batches(), _mean_loss, temperature=0.9, with_entropy=True).loss for _ in range(steps)]


def _plain_log_probs(folder: Path, device: torch.device) -> list[Tensor]:
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    with torch.no_grad():
        logits = [model(tokens[None].to(device)).logits[0, :-1] / 0.9 for tokens in _batch().tokens]
    return [
        rows.log_softmax(-1).cpu().gather(-1, tokens[1:, None]).squeeze(-1)[_PROMPT - 1 :]
        for rows, tokens in zip(logits, _batch().tokens, strict=True)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("torch_compile", [False, True], ids=["eager", "compiled"])
def test_log_probs_equal_those_of_single_sequences_in_float32(
    model_folder: Path, device: torch.device, attention: str, torch_compile: bool
) -> None:
    backend = _build(model_folder, device, attention=attention, torch_compile=torch_compile)
    expected = _plain_log_probs(model_folder, device)
    micro_batches = _micro_batches()
    for micro_batch, packed in zip(micro_batches, backend.forward(micro_batches, temperature=0.9).log_probs, strict=True):
        responses = unpack(packed, micro_batch, [_LENGTHS[i] - _PROMPT for i in micro_batch.indices])
        for index, log_probs in zip(micro_batch.indices, responses, strict=True):
            assert (log_probs - expected[index]).abs().mean() < 0.02


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("torch_compile", [False, True], ids=["eager", "compiled"])
def test_every_way_to_compute_trains_alike(
    model_folder: Path, device: torch.device, gradient_checkpointing: bool, torch_compile: bool
) -> None:
    plain = _train(_build(model_folder, device), steps=6)
    other = _train(
        _build(
            model_folder,
            device,
            attention="varlen",
            gradient_checkpointing=gradient_checkpointing,
            torch_compile=torch_compile,
        ),
        steps=6,
    )
    assert plain[-1] < plain[0] - 0.05
    assert other == pytest.approx(plain, abs=0.02)


def test_sleep_gives_the_memory_back_and_wake_restores_every_bit(model_folder: Path, device: torch.device) -> None:
    backend = _build(model_folder, device, attention="varlen")
    _train(backend, steps=2)
    before = {name: tensor.clone() for bucket in backend.weights(bucket_bytes=1 << 24) for name, tensor in bucket}
    num_weights = sum(tensor.numel() for tensor in before.values())
    awake = torch.cuda.memory_allocated(device)
    backend.sleep()
    asleep = torch.cuda.memory_allocated(device)
    # Masters and two moments, four bytes each.
    assert awake - asleep >= 0.98 * 12 * num_weights
    backend.wake()
    after = {name: tensor for bucket in backend.weights(bucket_bytes=1 << 24) for name, tensor in bucket}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert all(torch.tensor(_train(backend, steps=2)).isfinite())


@pytest.mark.parametrize("room", [False, True], ids=["policy on the host", "policy on the device"])
def test_the_reference_takes_no_model_beside_the_policys(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, device: torch.device, room: bool
) -> None:
    monkeypatch.setattr(offload, "has_room", lambda num_bytes, *, free: room)
    backend = _build(model_folder, device, attention="varlen")
    first = backend.forward(_micro_batches(), temperature=0.9).log_probs
    reference_model = Reference(backend)
    _train(backend, steps=2)
    before = {name: tensor.clone() for bucket in backend.weights(bucket_bytes=1 << 24) for name, tensor in bucket}
    sizes = [tensor.nbytes for tensor in before.values()]
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with reference_model._weights.swapped_in():
        taken = torch.cuda.max_memory_allocated(device) - held
    # Where the policy stays on the device its weights are there twice; each tensor takes whole blocks of 512 bytes.
    assert taken <= sum(sizes) * 1.01 if room else taken <= 2 * max(sizes)
    referenced = reference_model.forward(_micro_batches(), temperature=0.9).log_probs
    assert all(torch.equal(scored, wanted) for scored, wanted in zip(referenced, first, strict=True))
    after = {name: tensor for bucket in backend.weights(bucket_bytes=1 << 24) for name, tensor in bucket}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
