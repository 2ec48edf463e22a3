"""Checkpoints of every format give the same weights, and what is no whole checkpoint of the model is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from transformers import PretrainedConfig, Qwen3Config

from qwench.checkpoints.formats.dcp_reader import DcpFolder
from qwench.checkpoints.formats.dcp_writer import DcpWriter, write_metadata
from qwench.checkpoints.formats.sources import find_checkpoint, fingerprint, open_optimizer_state, open_weights
from qwench.errors import CheckpointError, ConfigError
from qwench.models.hf import architecture_of
from qwench.models.megatron_names import rules, to_megatron
from qwench.models.tensor_parts import HostMemory, Part

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CONFIG = Qwen3Config(
    vocab_size=12,
    hidden_size=8,
    intermediate_size=6,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=False,
)
MODEL = architecture_of(CONFIG)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in MODEL.parameter_shapes().items()}


def write_hf(folder: Path, weights: dict[str, Tensor], config: PretrainedConfig = CONFIG) -> Path:
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_fsdp(folder: Path, weights: dict[str, Tensor], *, num_steps: int | None = None) -> Path:
    dcp.save({name: tensor.float() for name, tensor in weights.items()}, checkpoint_id=folder / "model")
    if num_steps is not None:
        values = {"exp_avg": 0.5, "exp_avg_sq": 0.25}
        moments = {f"{name}.{moment}": torch.full(w.shape, values[moment]) for name, w in weights.items() for moment in values}
        dcp.save(moments, checkpoint_id=folder / "optimizer")
        dcp.save({"num_steps": torch.tensor(num_steps)}, checkpoint_id=folder / "lr_scheduler")
    return folder


def write_torch_dist(folder: Path, weights: dict[str, Tensor], *, padded_vocab: int = 12, num_layers: int = 3) -> Path:
    """Write as torch's own `dcp.save` does: all layers of a weight in one chunk."""
    stacked: dict[str, list[Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for rule in rules(MODEL):
        tensor = to_megatron(rule, [weights[name] for name in rule.hf_names], MODEL)
        if rule.kind == "vocab":
            tensor = torch.cat([tensor, torch.full((padded_vocab - 12, 8), 7.0).bfloat16()])
        if rule.layer is None:
            whole[rule.checkpoint_key] = tensor
        elif rule.layer < num_layers:
            stacked.setdefault(rule.checkpoint_key, []).append(tensor)
    dcp.save(whole | {key: torch.stack(layers) for key, layers in stacked.items()}, checkpoint_id=folder)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


def assert_gives(folder: Path, weights: dict[str, Tensor]) -> None:
    source = open_weights(folder, MODEL)
    assert set(source.specs) == set(weights)
    for name, spec in source.specs.items():
        tensor = source.read(name)
        assert tensor.is_contiguous() and tensor.dtype == spec.dtype and tuple(tensor.shape) == spec.shape
        assert torch.equal(tensor, weights[name].to(spec.dtype)), name
        end = tensor.shape[0]
        for part in (Part(start=end, stop=end), *(Part(start=1, stop=3, dim=dim) for dim in range(tensor.ndim))):
            assert torch.equal(source.read_part(name, part, HostMemory()), part.of(tensor)), (name, part)


def test_all_formats_give_the_weights(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    assert_gives(write_hf(tmp_path / "hf", weights), weights)
    assert_gives(write_fsdp(tmp_path / "fsdp", weights), weights)
    assert_gives(write_torch_dist(tmp_path / "torch_dist", weights), weights)
    assert_gives(write_torch_dist(tmp_path / "padded", weights, padded_vocab=16), weights)


def test_a_weight_can_be_read_twice(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    source = open_weights(write_torch_dist(tmp_path / "a", weights), MODEL)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(source.read(name), source.read(name))


def test_the_parent_is_enough(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    write_torch_dist(tmp_path / "megatron" / "release", weights)
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("release")
    write_fsdp(tmp_path / "ours" / "iter_0000020", weights)
    (tmp_path / "ours" / "latest_checkpointed_iteration.txt").write_text("20\n")
    assert_gives(tmp_path / "megatron", weights)
    assert_gives(tmp_path / "ours", weights)
    assert find_checkpoint(tmp_path / "ours", step=20) == tmp_path / "ours" / "iter_0000020"
    with pytest.raises(ConfigError, match=r"no checkpoint of iteration 30; it has \[20\]"):
        find_checkpoint(tmp_path / "ours", step=30)


@pytest.mark.parametrize(("pointer", "message"), [("40", "no iter_0000040"), ("newest", "must be release or a number")])
def test_a_pointer_to_nothing_is_named(tmp_path: Path, pointer: str, message: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(pointer)
    with pytest.raises(ConfigError, match=message):
        open_weights(tmp_path, MODEL)


def test_optimizer_state_is_found_by_name(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    state = open_optimizer_state(write_fsdp(tmp_path / "iter", weights, num_steps=7), MODEL)
    assert state is not None and state.num_steps == 7
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(state.masters.read(name), weights[name].float())
    assert torch.equal(state.moments["exp_avg"].read(name), torch.full((8, 6), 0.5))
    assert torch.equal(state.moments["exp_avg_sq"].read(name), torch.full((8, 6), 0.25))
    assert open_optimizer_state(write_fsdp(tmp_path / "without", weights), MODEL) is None


def test_the_state_of_muon_is_not_taken_for_another_model(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_fsdp(tmp_path / "iter", weights, num_steps=7)
    dcp.save({f"{name}.momentum": weight.float() for name, weight in weights.items()}, checkpoint_id=folder / "optimizer")
    with pytest.raises(ConfigError, match="has the moments of --optimizer muon, which its own backend alone reads"):
        open_optimizer_state(folder, MODEL)


def test_other_architectures_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    wider = {**weights, "model.layers.0.mlp.down_proj.weight": torch.zeros(8, 7).bfloat16()}
    with pytest.raises(ConfigError, match=r"down_proj.weight in the shape \[8, 7\], but config.json describes \[8, 6\]"):
        open_weights(write_hf(tmp_path / "wider", wider), MODEL)
    lacking = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    with pytest.raises(ConfigError, match=r"lacks lm_head\.weight"):
        open_weights(write_fsdp(tmp_path / "tied", lacking), MODEL)
    with pytest.raises(ConfigError, match=r"has 2 layers, but config\.json describes 3"):
        open_weights(write_torch_dist(tmp_path / "shallow", weights, num_layers=2), MODEL)
    deeper = replace(MODEL, ffn_hidden_size=5)
    with pytest.raises(ConfigError, match=r"mlp.linear_fc1.weight in the shape \[3, 12, 8\]"):
        open_weights(write_torch_dist(tmp_path / "narrow", weights), deeper)


def test_a_tied_head_in_torch_dist_must_equal_the_embedding(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    tied = replace(MODEL, tied_head=True)
    same = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    source = open_weights(write_torch_dist(tmp_path / "same", same), tied)
    assert set(source.specs) == set(weights) - {"lm_head.weight"}
    with pytest.raises(ConfigError, match=r"config\.json ties lm_head to the embeddings, but the weights differ"):
        open_weights(write_torch_dist(tmp_path / "other", weights), tied)


def test_half_written_checkpoints_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    hf = write_hf(tmp_path / "hf", weights)
    os.truncate(hf / "model.safetensors", (hf / "model.safetensors").stat().st_size - 10)
    with pytest.raises(CheckpointError, match="half-written"):
        open_weights(hf, MODEL)
    cut = write_torch_dist(tmp_path / "cut", weights)
    os.truncate(cut / "__0_0.distcp", 1000)
    with pytest.raises(CheckpointError, match="cut short"):
        open_weights(cut, MODEL)
    gone = write_fsdp(tmp_path / "gone", weights)
    (gone / "model" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        open_weights(gone, MODEL)
    begun = write_torch_dist(tmp_path / "begun", weights)
    (begun / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="not finished"):
        open_weights(begun, MODEL)
    with pytest.raises(CheckpointError, match="not finished"):
        open_weights(write_hf(tmp_path / "hf.writing", weights), MODEL)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no checkpoint"):
        open_weights(tmp_path, MODEL)
    with pytest.raises(ConfigError, match="there is no folder"):
        open_weights(tmp_path / "absent", MODEL)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="no part of the format"):
        DcpFolder(tmp_path)
    writer = DcpWriter(tmp_path / "data", 0)
    writer.add("layers", torch.ones(300))
    writer.close()
    write_metadata(tmp_path / "data", [writer.written], flat_keys=False)
    (file,) = (tmp_path / "data").glob("*.distcp")
    size = file.stat().st_size
    torch.save(Attack(), file)
    file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    with pytest.raises(CheckpointError, match="layers cannot be read"):
        DcpFolder(tmp_path / "data").read("layers")
    assert not (tmp_path / "ran").exists()


def test_what_is_written_is_read_by_torch_and_by_us(tmp_path: Path) -> None:
    layers, norm = torch.arange(24.0).reshape(2, 3, 4), torch.arange(5).bfloat16()
    folders = [DcpWriter(tmp_path, rank) for rank in (0, 1)]
    folders[0].add("layers", layers[0], layer=0, num_layers=2)
    folders[1].add("layers", layers[1], layer=1, num_layers=2)
    folders[1].add("norm", norm)
    folders[1].add_object("position", {"row": 7})
    for writer in folders:
        writer.close()
    write_metadata(tmp_path, [writer.written for writer in folders], flat_keys=True)
    found = {"layers": torch.zeros(2, 3, 4), "norm": torch.zeros(5).bfloat16()}
    dcp.load(found, checkpoint_id=tmp_path)
    objects: dict[str, object] = {"position": None}
    dcp.load(objects, checkpoint_id=tmp_path)
    assert objects == {"position": {"row": 7}}
    ours = DcpFolder(tmp_path)
    for whole in (found, {"layers": ours.read("layers"), "norm": ours.read("norm")}):
        assert torch.equal(whole["layers"], layers) and torch.equal(whole["norm"], norm)
    assert torch.equal(ours.read("layers", layer=1), layers[1])


def test_chunks_that_do_not_cover_a_tensor_are_noticed(tmp_path: Path) -> None:
    writer = DcpWriter(tmp_path, 0)
    writer.add("layers", torch.ones(3), layer=1, num_layers=2)
    writer.close()
    write_metadata(tmp_path, [writer.written], flat_keys=False)
    with pytest.raises(CheckpointError, match="holds 3 of 6 elements of layers"):
        DcpFolder(tmp_path).read("layers")


def _folder_of_one(folder: Path) -> tuple[Path, bytes, Path, bytes]:
    """Write one tensor; return the files of metadata and data, and what they hold."""
    writer = DcpWriter(folder, 0)
    writer.add("norm", torch.ones(5))
    writer.close()
    write_metadata(folder, [writer.written], flat_keys=False)
    metadata, data = folder / ".metadata", folder / "__0_0.distcp"
    return metadata, metadata.read_bytes(), data, data.read_bytes()


def test_whatever_bytes_change_a_folder_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    draw = random.Random(3)
    files = _folder_of_one(tmp_path)
    for _ in range(150):
        for path, whole in (files[:2], files[2:]):
            content = bytearray(whole)
            for _ in range(draw.choice((1, 2, 8))):
                content[draw.randrange(len(content))] = draw.randrange(256)
            path.write_bytes(content)
            try:
                folder = DcpFolder(tmp_path)
                assert all(folder.read(key).shape == spec.shape for key, spec in folder.tensors.items())
            except CheckpointError as error:
                assert "\n" not in str(error)
            path.write_bytes(whole)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little"), "cannot be read"),
        (b"\x80\x04\x95" + b"\xff" * 8, "cannot be read"),
        (b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".", r"holds no metadata of torch\.distributed\.checkpoint"),
    ],
    ids=["more bytes than memory", "more bytes than numbers", "deep"],
)
def test_metadata_that_asks_for_too_much_is_refused(tmp_path: Path, metadata: bytes, message: str) -> None:
    (tmp_path / ".metadata").write_bytes(metadata)
    with pytest.raises(CheckpointError, match=rf"\.metadata {message}"):
        DcpFolder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: setattr(found, "storage_data", [1]), r"\.metadata cannot be read"),
        (lambda found: setattr(found, "storage_data", None), "norm cannot be read"),
        (lambda found: setattr(found.state_dict_metadata["norm"].properties, "dtype", torch.int8), r"no?t hold .* in int8"),
        (
            lambda found: setattr(found.state_dict_metadata["norm"], "size", torch.Size([2**50])),
            "norm cannot be read",
        ),
        (lambda found: [object.__setattr__(at, "length", -1) for at in found.storage_data.values()], "before the file"),
    ],
    ids=["no table", "without storage", "other dtype", "endless", "negative"],
)
def test_metadata_that_contradicts_its_files_is_refused(
    tmp_path: Path, change: Callable[[Metadata], object], message: str
) -> None:
    path, content, _, _ = _folder_of_one(tmp_path)
    found = pickle.loads(content)
    change(found)
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match=message):
        DcpFolder(tmp_path).read("norm")


def test_a_fingerprint_is_the_checksum_of_the_first_and_the_last_projection_of_keys() -> None:
    names = ["layers.0.k_proj.weight", "layers.0.mlp.weight", "layers.1.k_proj.weight", "layers.2.k_proj.weight", "norm"]
    weights = {name: torch.tensor([float(i), 0.5]).bfloat16() for i, name in enumerate(names)}

    def of(names: list[str]) -> str:
        return fingerprint(SimpleNamespace(specs=dict.fromkeys(names), read=weights.__getitem__))

    assert of(names) == f"{zlib.crc32(struct.pack('<4f', 0.0, 0.5, 3.0, 0.5)):08x}"
    assert of(names[:1]) == f"{zlib.crc32(struct.pack('<2f', 0.0, 0.5)):08x}"
    # A training checkpoint in float32 is known again in its export, which is in bfloat16.
    weights[names[0]] = torch.tensor([0.1, 0.5])
    assert of(names[:1]) == f"{zlib.crc32(struct.pack('<2f', 0.10009765625, 0.5)):08x}"


@pytest.mark.parametrize(
    "value",
    [torch.Size([2]), torch.strided, OrderedDict(a=1), defaultdict(None, a=1), {1, 2}, frozenset({1, 2})],
    ids=lambda value: type(value).__name__,
)
def test_metadata_may_hold_plain_classes(tmp_path: Path, value: object) -> None:
    dcp.save({"norm": torch.ones(3)}, checkpoint_id=tmp_path)
    found = pickle.loads((tmp_path / ".metadata").read_bytes())
    found.planner_data = {"norm": value}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found, protocol=3))
    assert DcpFolder(tmp_path).read("norm").tolist() == [1.0] * 3
