"""The Megatron backend on one GPU: the contract's steps at TP1 over NCCL, and at TP2 and CP2 by two gloo ranks that share it.

gloo's collectives take CUDA tensors, its send and receive do not, so there is no pipeline here. The same runs on a CPU with the
stand-in for CUDA, without NCCL: `pytest tests/gpu/test_megatron.py -k cpu`.
"""

import faulthandler
import gc
from dataclasses import asdict
from datetime import timedelta
from itertools import product
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
from qwench.training.trainer import Trainer
from tests.contract import train_backend_cases as cases
from tests.contract.rank_processes import run_ranks
from tests.deadlines import patient
from tests.fakes.sections import adamw
from tests.fakes.trainer import take_step

pytest.importorskip("megatron.core")

_CUDA = [pytest.mark.gpu(1), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
_ALL_SAMPLES = [[6, 1], [7, 3, 0, 5], [2, 4]]
_LAYOUTS = {"tp1": (1, {}), "tp2": (2, {"tp": 2, "sequence_parallel": True}), "cp2": (2, {"cp": 2})}
_MODELS = ("tied", "untied")
_TIMEOUT_S = patient(240)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=_CUDA)])
def device(request) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the stand-in is for machines without CUDA")
    return request.param


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_steps_equal_the_plain_loop(device: str, layout: str, tmp_path: Path):
    for model in _MODELS:
        cases.write_model(tmp_path / model, tied=model == "tied")
    world_size, _ = _LAYOUTS[layout]
    _run_ranks(_steps_of_a_rank, world_size, device, layout, tmp_path)
    for rank, model in product(range(world_size), _MODELS):
        plain = cases.plain_loop(tmp_path / model)
        record = torch.load(tmp_path / f"{model}.{rank}.pt", weights_only=False)
        assert [step["loss"] for step in record["steps"]] == pytest.approx(plain.losses, rel=1e-4, abs=1e-5)
        assert [step["grad_norm"] for step in record["steps"]] == pytest.approx(plain.grad_norms, rel=1e-4)
        assert record["weights"].keys() == plain.weights.keys()
        for name, weight in record["weights"].items():
            torch.testing.assert_close(
                weight, plain.weights[name], rtol=1e-4, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=_CUDA)])
def test_bfloat16_agrees_with_fsdp_and_memory_is_lent(device: str, tmp_path: Path):
    torch.manual_seed(3)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    sizes = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(
        tmp_path / "model"
    )
    _run_ranks(_bfloat16_beside_fsdp, 1, device, "tp1", tmp_path)
    record = torch.load(tmp_path / "0.pt", weights_only=False)
    megatron, fsdp = record["megatron"], record["fsdp"]
    assert float((megatron["log_probs"] - fsdp["log_probs"]).abs().mean()) < 0.01
    assert megatron["losses"] == pytest.approx(fsdp["losses"], rel=5e-3)
    assert megatron["grad_norms"] == pytest.approx(fsdp["grad_norms"], rel=2e-2)
    # Weights 2, gradients 4, masters 4 and moments 8 bytes a parameter; what is left is cuBLAS's workspace.
    assert megatron["awake_bytes"] - megatron["asleep_bytes"] > 0.98 * 18 * megatron["num_parameters"]
    assert megatron["same_after_sleep"]


def _run_ranks(function, world_size: int, device: str, layout: str, folder: Path) -> None:
    ranks = [(rank, world_size, device, layout, folder) for rank in range(world_size)]
    run_ranks(function, ranks, folder=folder, timeout_s=_TIMEOUT_S)


def _join(rank: int, world_size: int, device: str, folder: Path) -> torch.device:
    faulthandler.enable()
    torch.set_num_threads(1)
    if device == "cpu":
        from tests.fakes.cuda_stand_in import install  # noqa: PLC0415  # only where there is no CUDA

        install()
    name = "nccl" if device == "cuda" and world_size == 1 else "gloo"
    if device == "cuda" and name == "gloo":
        from tests.fakes.gloo_on_cuda import install  # noqa: PLC0415  # imports megatron-core

        install()
    store, timeout = f"file://{folder}/store", timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group(name, init_method=store, rank=rank, world_size=world_size, timeout=timeout)
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def _megatron(folder: Path, device: torch.device, layout: str, dtype: torch.dtype, optimizer: OptimizerConfig) -> Trainer:
    from qwench.config.layout import ParallelLayout  # noqa: PLC0415
    from qwench.training.megatron.megatron_trainer import MegatronTrainer  # noqa: PLC0415  # after the stand-in

    return MegatronTrainer.build(
        folder,
        training=TrainingConfig(log_probs_chunk_size=7),
        optimizer=optimizer,
        total_steps=1,
        layout=ParallelLayout(**_LAYOUTS[layout][1]),
        param_dtype=dtype,
        device=device,
        collective_timeout_s=_TIMEOUT_S,
    )


def _steps_of_a_rank(rank: int, world_size: int, device_name: str, layout: str, folder: Path) -> None:
    device = _join(rank, world_size, device_name, folder)
    from megatron.core import parallel_state  # noqa: PLC0415  # after the stand-in

    for model in _MODELS:
        backend = _megatron(folder / model, device, layout, torch.float32, cases.OPTIMIZER)
        batch = cases.micro_batches(cases.make_batch(), _ALL_SAMPLES)
        steps = [
            take_step(backend, batch, cases.clipped_loss, temperature=cases.TEMPERATURE, with_entropy=True)
            for _ in range(cases.NUM_STEPS)
        ]
        weights = {name: tensor.cpu() for bucket in backend.weights(bucket_bytes=1 << 14) for name, tensor in bucket}
        torch.save({"steps": [asdict(step) for step in steps], "weights": weights}, folder / f"{model}.{rank}.pt")
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _bfloat16_beside_fsdp(rank: int, world_size: int, device_name: str, layout: str, folder: Path) -> None:
    device = _join(rank, world_size, device_name, folder)
    optimizer = adamw(lr=cases.PEAK_LR, lr_warmup_iters=2)
    fsdp = FsdpTrainer.build(
        folder / "model",
        training=TrainingConfig(),
        optimizer=optimizer,
        total_steps=1,
        param_dtype=torch.bfloat16,
        device=device,
        attention="varlen",
    )
    records = {"fsdp": _bfloat16_steps(fsdp)}
    del fsdp
    gc.collect()
    torch.cuda.empty_cache()
    megatron = _megatron(folder / "model", device, layout, torch.bfloat16, optimizer)
    records["megatron"] = _bfloat16_steps(megatron) | _lend_memory(megatron)
    torch.save(records, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _bfloat16_steps(backend: Trainer) -> dict[str, object]:
    draw = torch.Generator().manual_seed(0)
    lengths, prompt = (40, 7, 133, 64, 3, 96), 2
    batch = RolloutBatch(
        tokens=[torch.randint(2048, (length,), generator=draw) for length in lengths],
        loss_mask=[torch.ones(length - prompt, dtype=torch.bool) for length in lengths],
        rewards=torch.zeros(len(lengths)),
        graded=torch.ones(len(lengths), dtype=torch.bool),
        group_ids=torch.zeros(len(lengths), dtype=torch.int64),
        execution_ids=torch.arange(len(lengths)),
    )
    micro_batches = [pack(batch, [0, 3, 1]), pack(batch, [2, 5, 4])]
    scored = torch.cat(backend.forward(micro_batches, temperature=1.0).log_probs)
    steps = [take_step(backend, micro_batches, _mean_loss, temperature=1.0, with_entropy=True) for _ in range(3)]
    return {"log_probs": scored, "losses": [step.loss for step in steps], "grad_norms": [step.grad_norm for step in steps]}


def _mean_loss(log_probs: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    assert entropy is not None
    return TokenLoss(loss=-(log_probs + 0.01 * entropy).sum() / 331, metrics={"entropy": entropy.detach().sum() / 331})


def _lend_memory(backend: Trainer) -> dict[str, object]:
    before = {name: tensor.clone().cpu() for bucket in backend.weights(bucket_bytes=1 << 24) for name, tensor in bucket}
    awake = torch.cuda.memory_allocated()
    backend.sleep()
    asleep = torch.cuda.memory_allocated()
    backend.wake()
    after = {name: tensor.cpu() for bucket in backend.weights(bucket_bytes=1 << 24) for name, tensor in bucket}
    same = all(torch.equal(before[name], after[name]) for name in before)
    num_parameters = sum(tensor.numel() for tensor in before.values())
    return {"num_parameters": num_parameters, "awake_bytes": awake, "asleep_bytes": asleep, "same_after_sleep": same}
