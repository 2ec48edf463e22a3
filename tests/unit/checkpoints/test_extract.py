"""Adapters from the difference of two models, and adapters of another rank."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from qwench.checkpoints.convert import Conversion, Converter
from qwench.checkpoints.extract import extract_adapter
from qwench.checkpoints.formats.sources import MergedWeights, fingerprint, open_weights
from qwench.checkpoints.manifest import write_manifest
from qwench.errors import ConfigError
from qwench.models.architecture import Architecture
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.peft import AdapterConfig, AdapterFolder, write_adapter
from tests.contract.train_backend_cases import write_model

_NAME = "model.layers.1.self_attn.q_proj"
_SINGULAR = (4.0, 2.0, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a base, and a model whose one projection has changed by a matrix of known singular values."""
    base, tuned = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("tuned")
    write_model(base, tied=True)
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter(f"{_NAME}.weight").add_(_known_change(model.get_parameter(f"{_NAME}.weight").shape))
        model.get_parameter("model.norm.weight").mul_(2.0)
    model.save_pretrained(tuned)
    return base, tuned


def _known_change(shape: torch.Size) -> Tensor:
    draw = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(size, 3, generator=draw))[0] for size in shape)
    return left @ torch.diag(torch.tensor(_SINGULAR)) @ right.T


def _model(folder: Path) -> Architecture:
    return architecture_of(load_hf_config(folder))


@pytest.mark.parametrize(("rank", "kept"), [(3, 1.0), (2, 20 / 21), (1, 16 / 21)])
def test_an_adapter_holds_the_largest_singular_values_of_a_change(folders, tmp_path: Path, rank: int, kept: float):
    base, tuned = folders
    extracted = extract_adapter(tuned, base, _model(base), rank=rank, output=tmp_path / "adapter")
    assert extracted.kept == pytest.approx(kept, abs=1e-5)
    assert extracted.num_other == 1  # the last norm
    merged = MergedWeights(open_weights(base, _model(base)), AdapterFolder(tmp_path / "adapter"), _model(base), dtype=None)
    wanted = load_file(tuned / "model.safetensors")[f"{_NAME}.weight"]
    lost = (merged.read(f"{_NAME}.weight") - wanted).square().sum()
    assert float(lost) == pytest.approx(sum(s * s for s in _SINGULAR[rank:]), abs=1e-4)


def test_an_adapter_gets_another_rank_and_is_the_same_where_that_is_enough(folders, tmp_path: Path):
    base, _ = folders
    draw = torch.Generator().manual_seed(5)
    config = AdapterConfig(rank=2, alpha=8.0, use_rslora=True, targets=("k_proj", "down_proj"))
    matrices = {name: torch.randn(shape, generator=draw) for name, shape in config.shapes(_model(base)).items()}
    (tmp_path / "first").mkdir()
    write_adapter(tmp_path / "first", config, matrices)
    for rank in (1, 5):
        extracted = extract_adapter(tmp_path / "first", base, _model(base), rank=rank, output=tmp_path / str(rank))
        assert (extracted.kept == pytest.approx(1.0, abs=1e-5)) == (rank == 5)
    with pytest.raises(ConfigError, match=r"--lora-rank 17 is more than the 16 of .*k_proj"):  # 16 x 32
        extract_adapter(tmp_path / "first", base, _model(base), rank=17, output=tmp_path / "17")
    found = AdapterFolder(tmp_path / "5")
    assert (found.config.rank, found.config.scale, found.config.targets) == (5, 1.0, ("k_proj", "down_proj"))
    name = "model.layers.0.mlp.down_proj"
    a, b = (found.read(f"{name}.lora_{leaf}.weight") for leaf in "AB")
    expected = 8.0 / 2**0.5 * matrices[f"{name}.lora_B.weight"] @ matrices[f"{name}.lora_A.weight"]
    torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-4)


def test_no_change_and_a_rank_beyond_the_matrix_are_refused(folders, tmp_path: Path):
    base, tuned = folders
    with pytest.raises(ConfigError, match="there is no change to extract"):
        extract_adapter(base, base, _model(base), rank=2, output=tmp_path / "same")
    with pytest.raises(ConfigError, match="--lora-rank 99 is more than"):
        extract_adapter(tuned, base, _model(base), rank=99, output=tmp_path / "large")
    assert list(tmp_path.iterdir()) == []


def _plain(base: Path, folder: Path) -> Path:
    config = AdapterConfig(rank=2, alpha=8.0, use_rslora=False, targets=("k_proj",))
    folder.mkdir()
    write_adapter(folder, config, {name: torch.zeros(shape) for name, shape in config.shapes(_model(base)).items()})
    return folder


@pytest.mark.parametrize(
    ("key", "value", "is_read"),
    [("init_lora_weights", value, True) for value in (True, False, None, "gaussian", "eva", "orthogonal", "mica")]
    + [("init_lora_weights", value, False) for value in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new")]
    + [("layer_replication", [[0, 2], [1, 3]], False), ("alora_invocation_tokens", [5], False), ("rank_pattern", {}, True)]
    + [("rank_pattern", {"k_proj": 4}, False), ("alpha_pattern", {"k_proj": 4}, False)],
)
def test_an_adapter_whose_sum_with_the_base_is_another_model_is_refused(folders, tmp_path: Path, key, value, is_read):
    file = _plain(folders[0], tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with nullcontext() if is_read else pytest.raises(ConfigError, match=key):
        AdapterConfig.read(file.parent)


def test_a_run_s_adapter_is_merged_and_changes_its_rank_with_the_base_of_the_run_alone(folders, tmp_path: Path):
    base, _ = folders
    adapter = _plain(base, tmp_path / "adapter")
    for written, said in ((fingerprint(open_weights(base, _model(base))), None), ("00000000", "trained on another base")):
        (adapter / "meta.json").unlink(missing_ok=True)
        write_manifest(adapter, {"identity": {"base_weights": written}})
        words = {"source": adapter, "output": tmp_path / "out", "to": "hf", "hf_folder": base, "config": load_hf_config(base)}
        with nullcontext() if said is None else pytest.raises(ConfigError, match=said):
            Converter(Conversion(**words))
        if said is not None:
            with pytest.raises(ConfigError, match=said):
                extract_adapter(adapter, base, _model(base), rank=1, output=tmp_path / "other_rank")
