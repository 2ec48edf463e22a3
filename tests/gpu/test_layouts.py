"""Both backends over NCCL, a GPU to a rank: the contract's steps in every layout that the machine has GPUs for."""

from pathlib import Path

import pytest
import torch

from tests.contract import train_backend_cases as cases
from tests.contract import train_backend_layouts as layouts
from tests.contract.train_backend_checks import ON_GPU, assert_log_probs_equal, assert_steps_equal, read_records
from tests.contract.train_backend_ranks import Case, run_world

pytest.importorskip("megatron.core")

_MODELS = ("tied", "untied")
RUNS: list[tuple[int, Case]] = [
    *(layouts.megatron(f"{on}-{model}", model, on=on) for on in layouts.LAYOUTS for model in _MODELS),
    *(layouts.fsdp(f"{on}-{model}", model, on=on) for on in layouts.FSDP_SIZES for model in _MODELS),
    layouts.fsdp("fsdp-2-recomputed", "untied", on="fsdp-2", gradient_checkpointing=True),
    layouts.fsdp("fsdp-2-reduced-early", "tied", on="fsdp-2", reduce_every_micro_batch=True),
    layouts.fsdp("fsdp-2x2", "tied", on="fsdp-4", dp_replicate=2),
    *(layouts.fsdp(f"{on}-whole", "untied", on=on, whole_weights=True) for on in ("fsdp-2", "fsdp-4")),
    layouts.fsdp("fsdp-2x2-whole", "tied", on="fsdp-4", dp_replicate=2, whole_weights=True),
    layouts.megatron("tp2-sp-offloaded", "untied", on="tp2-sp", offload_fraction=1.0),
]


def _on_gpus(world_size: int, case: Case) -> object:
    too_few = pytest.mark.skipif(torch.cuda.device_count() < world_size, reason=f"needs {world_size} CUDA devices")
    return pytest.param(world_size, case, id=case.name, marks=[pytest.mark.gpu(world_size), too_few])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every case that there are GPUs for, once, and leave the records here."""
    folder = tmp_path_factory.mktemp("layouts")
    for model in _MODELS:
        cases.write_model(folder / model, tied=model == "tied")
    for world_size in sorted({size for size, _ in RUNS if size <= torch.cuda.device_count()}):
        run_world(world_size, [case for size, case in RUNS if size == world_size], folder, device_type="cuda")
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, cases.StepsRecord]:
    """Return the plain loop's records by model."""
    return {model: cases.plain_loop(folder / model) for model in _MODELS}


@pytest.mark.parametrize(("world_size", "case"), [_on_gpus(*run) for run in RUNS])
def test_steps_equal_the_plain_loop(folder: Path, plain: dict[str, cases.StepsRecord], world_size: int, case: Case) -> None:
    for record in read_records(folder, case, world_size):
        assert_steps_equal(record, plain[case.model], within=ON_GPU)
        assert_log_probs_equal(record, case, plain[case.model], within=ON_GPU)
