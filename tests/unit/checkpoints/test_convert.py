"""Conversions keep every bit, optimizer and run included; what is wrong is said before anything is written."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Qwen3Config

from qwench.checkpoints.convert import Conversion, Converted, Converter, Ranks
from qwench.checkpoints.folders import MARKER
from qwench.checkpoints.formats import targets
from qwench.checkpoints.formats.dcp_reader import read_metadata
from qwench.checkpoints.formats.fp8 import QuantizedSource
from qwench.checkpoints.formats.sources import Format, WeightSource, open_optimizer_state, open_weights
from qwench.checkpoints.formats.targets import WEIGHTS, FsdpTarget, HfTarget, Job, Stream, share
from qwench.checkpoints.manifest import read_manifest, write_manifest
from qwench.errors import CheckpointError, ConfigError
from qwench.models.fp8 import quantized
from qwench.models.hf import architecture_of, load_hf_config, write_hf_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPE = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def write_hf(folder: Path, *, tied: bool = True, seed: int = 1) -> Path:
    config = Qwen3Config(**SHAPE, tie_word_embeddings=tied, dtype="bfloat16")
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    weights = [
        (name, torch.randn(shape, generator=generator).bfloat16())
        for name, shape in architecture_of(config).parameter_shapes().items()
    ]
    write_hf_checkpoint(folder.with_name(folder.name + "-full"), [weights], source=folder)
    shutil.rmtree(folder)
    return folder.with_name(folder.name + "-full").rename(folder)


def run(source: Path, output: Path, to: Format, *, hf: Path, shard_bytes: int = 10**9, replace: bool = False) -> Converted:
    conversion = Conversion(
        source=source,
        output=output,
        to=to,
        hf_folder=hf,
        config=load_hf_config(hf),
        max_shard_bytes=shard_bytes,
        replace=replace,
    )
    return Converter(conversion).run(Ranks(), lambda nbytes: None)


def write_run(root: Path, hf: Path) -> Path:
    """Write what a run of the FSDP backend leaves: masters that are no bfloat16 values, moments, where it stood."""
    folder = root / "iter_0000020"
    source = open_weights(hf, architecture_of(load_hf_config(hf)))
    masters = {name: source.read(name).float() * 1.0001 for name in source.specs}
    dcp.save(masters, checkpoint_id=folder / "model")
    moments = {f"{name}.exp_avg": master * 0.5 for name, master in masters.items()}
    moments |= {f"{name}.exp_avg_sq": master.square() for name, master in masters.items()}
    dcp.save(moments, checkpoint_id=folder / "optimizer")
    dcp.save({"num_steps": torch.tensor(40)}, checkpoint_id=folder / "lr_scheduler")
    (folder / "rollouts.json").write_text('{"cursor": 3}')
    (folder / "rng.pt").write_bytes(b"generators")
    write_manifest(folder, {"iteration": 20, "identity": {"model_type": "qwen3"}, "has_optimizer": True})
    (root / MARKER).write_text('{"model_type": "qwen3"}')
    (root / "latest_checkpointed_iteration.txt").write_text("20\n")
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_gives_the_same_file(tmp_path: Path, tied: bool) -> None:
    hf = write_hf(tmp_path / "hf", tied=tied)
    run(hf, tmp_path / "megatron", "torch_dist", hf=hf)
    run(tmp_path / "megatron" / "release", tmp_path / "fsdp", "fsdp", hf=hf)
    run(tmp_path / "fsdp" / "release", tmp_path / "back", "hf", hf=hf)
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert (
        open_weights(tmp_path / "fsdp", architecture_of(load_hf_config(hf))).specs["model.norm.weight"].dtype == torch.float32
    )


@pytest.mark.parametrize("shard_bytes", [10**9, 300])
def test_fp8_is_what_publication_makes_of_the_same_weights(tmp_path: Path, shard_bytes: int) -> None:
    hf = write_hf(tmp_path / "hf", tied=False)
    converted = run(hf, tmp_path / "fp8", "fp8", hf=hf, shard_bytes=shard_bytes)
    (published,) = quantized([list(load_file(hf / "model.safetensors").items())])
    files = [load_file(file) for file in sorted((tmp_path / "fp8").glob("*.safetensors"))]
    held = {name: tensor for file in files for name, tensor in file.items()}
    assert held.keys() == dict(published).keys() and converted.num_tensors == len(held)
    assert (len(files) > 3) == (shard_bytes == 300)
    for name, tensor in published:
        assert held[name].dtype == tensor.dtype
        assert torch.equal(held[name].view(torch.uint8), tensor.view(torch.uint8))
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


def test_what_is_stored_or_quantized_as_one_is_one_job(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    run(hf, tmp_path / "megatron", "torch_dist", hf=hf)
    megatron = open_weights(tmp_path / "megatron", architecture_of(load_hf_config(hf)))
    fp8 = QuantizedSource(open_weights(hf, architecture_of(load_hf_config(hf))), dtype=None)
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))

    def to_hf(source: WeightSource, *, shard_bytes: int = 10**9) -> list[tuple[str, ...]]:
        stream = Stream(kind=WEIGHTS, source=source)
        return [job.names for job in HfTarget(tmp_path, stream, hf_folder=hf, max_shard_bytes=shard_bytes).jobs]

    fsdp = FsdpTarget(tmp_path / "fsdp", [Stream(kind=WEIGHTS, source=megatron)], rank=0, num_steps=None)
    assert (gate, up) in to_hf(megatron) and (gate, up) in [job.names for job in fsdp.jobs]
    assert (gate, f"{gate}_scale_inv") in to_hf(fp8)
    assert {(gate,), (up,)} < set(to_hf(megatron, shard_bytes=1)), "a job fills one file"
    whole = sum(spec.nbytes for spec in megatron.specs.values())
    target = HfTarget(tmp_path, Stream(kind=WEIGHTS, source=megatron), hf_folder=hf, max_shard_bytes=whole)
    assert {job.unit for job in target.jobs} == {0}, "a file may be full to the last byte"
    fsdp.close()


def test_fp8_becomes_the_bfloat16_that_it_stands_for(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    run(hf, tmp_path / "fp8", "fp8", hf=hf)
    run(tmp_path / "fp8", tmp_path / "back", "hf", hf=tmp_path / "fp8")
    stored, back = load_file(tmp_path / "fp8" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(back[name], (stored[name].float() * stored[name + "_scale_inv"].item()).bfloat16())
    assert not any("scale" in other for other in back)
    assert (tmp_path / "back" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def test_shards_are_cut_by_size(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", tied=False)
    run(hf, tmp_path / "sharded", "hf", hf=hf, shard_bytes=400)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "sharded" / name) for name in set(index["weight_map"].values())}
    assert len(files) > 3
    for tensors in files.values():
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 400
    for name, tensor in load_file(hf / "model.safetensors").items():
        assert torch.equal(files[index["weight_map"][name]][name], tensor)


def test_optimizer_and_run_go_along(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    config = load_hf_config(hf)
    folder = write_run(tmp_path / "run", hf)
    assert run(folder, tmp_path / "megatron", "torch_dist", hf=hf).with_optimizer
    assert run(tmp_path / "megatron" / "iter_0000020", tmp_path / "back", "fsdp", hf=hf).with_optimizer
    before = open_optimizer_state(tmp_path / "run", architecture_of(config))
    for name in ("megatron", "back"):
        state = open_optimizer_state(tmp_path / name, architecture_of(config))
        assert before is not None and state is not None
        assert state.num_steps == 40
        for weight in architecture_of(config).parameter_shapes():
            assert torch.equal(state.masters.read(weight), before.masters.read(weight))
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state.moments[moment].read(weight), before.moments[moment].read(weight))
        manifest = read_manifest(tmp_path / name / "iter_0000020")
        assert manifest["iteration"] == 20 and manifest["identity"] == {"model_type": "qwen3"}
        assert (tmp_path / name / "iter_0000020" / "rollouts.json").read_text() == '{"cursor": 3}'
        assert (tmp_path / name / "iter_0000020" / "rng.pt").read_bytes() == b"generators" and manifest["has_optimizer"]
        assert (tmp_path / name / "latest_checkpointed_iteration.txt").read_text() == "20\n"
        assert (tmp_path / name / MARKER).is_file()
    back = tmp_path / "back" / "iter_0000020"
    for part in ("model", "optimizer", "lr_scheduler"):
        metadata = read_metadata(back / part / ".metadata")
        assert metadata.planner_data == {key: (key,) for key in metadata.state_dict_metadata}, "keys are no paths"
    assert not read_metadata(tmp_path / "megatron" / "iter_0000020" / ".metadata").planner_data
    # What is computed with are the masters' roundings.
    weights = open_weights(tmp_path / "megatron", architecture_of(config))
    assert torch.equal(weights.read("model.norm.weight"), before.masters.read("model.norm.weight").bfloat16())


def test_progress_counts_what_is_written_and_read_back(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    folder = write_run(tmp_path / "run", hf)
    shapes = architecture_of(load_hf_config(hf)).parameter_shapes().values()
    count, elements = len(shapes), sum(map(math.prod, shapes))
    (tmp_path / "alone.writing" / "release").mkdir(parents=True)
    (tmp_path / "alone.writing" / "release" / "__0_0.distcp").touch()  # of a run that was killed
    for name, options, element_bytes, num_streams in (
        ("whole", {}, 2 + 4 + 4 + 4, 4),
        ("alone", {"with_optimizer": False}, 2, 1),
        ("wide", {"dtype": torch.float32, "with_optimizer": False}, 4, 1),
    ):
        parts = {"source": folder, "output": tmp_path / name, "hf_folder": hf, "config": load_hf_config(hf)}
        converter, done = Converter(Conversion(**parts, to="torch_dist", **options)), list[int]()
        converted = converter.run(Ranks(), done.append)
        nbytes = elements * element_bytes
        assert converted == Converted(num_tensors=count * num_streams, nbytes=nbytes, with_optimizer=name == "whole")
        assert sum(done) == 2 * nbytes and converter.nbytes == nbytes
        assert converter.weight_dtype == (torch.float32 if name == "wide" else torch.bfloat16)
        assert [path.name for path in (tmp_path / name).glob("*e*0")] == (["iter_0000020"] if name == "whole" else [])
        assert (tmp_path / name / "release").is_dir() == (name != "whole")


def test_masters_of_a_model_without_a_dtype_become_bfloat16(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    folder, config = write_run(tmp_path / "run", hf), load_hf_config(hf)
    config.dtype = None
    converter = Converter(Conversion(source=folder, output=tmp_path / "out", to="hf", hf_folder=hf, config=config))
    assert converter.streams[0].dtype == torch.bfloat16


def test_tensors_are_read_ahead_up_to_half_a_gibibyte_or_one_that_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    class Pool(nullcontext):
        def submit(self, load, job):
            begun.append(job.nbytes)
            return SimpleNamespace(result=lambda: load(job))

    monkeypatch.setattr(targets, "ThreadPoolExecutor", lambda *given, **options: Pool(Pool()))
    most = 2**29
    sizes = [most - 4, 4, 1, 2 * most, 3]
    seen = []
    for job, loaded in targets.read_ahead([SimpleNamespace(nbytes=size) for size in sizes], lambda job: -job.nbytes):
        assert loaded == -job.nbytes
        seen.append((job.nbytes, list(begun)))
    assert seen == [(size, sizes[:count]) for size, count in zip(sizes, (2, 3, 3, 4, 5), strict=True)]


def test_what_exists_is_never_overwritten_unless_asked(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("keep me")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        run(hf, tmp_path / "taken", "torch_dist", hf=hf)
    assert (tmp_path / "taken" / "precious").read_text() == "keep me"
    run(hf, tmp_path / "taken", "torch_dist", hf=hf, replace=True)
    assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == ["latest_checkpointed_iteration.txt", "release"]


def test_a_disk_that_is_too_small_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_hf(tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ConfigError, match=r"the output .* needs .* KiB, but .* has 0\.1 KiB free"):
        run(hf, tmp_path / "out", "torch_dist", hf=hf)
    assert not (tmp_path / "out.writing").exists()


def test_other_bits_on_the_disk_are_noticed_and_nothing_is_left(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    conversion = Conversion(source=hf, output=tmp_path / "out", to="torch_dist", hf_folder=hf, config=load_hf_config(hf))
    damaged = False

    def damage(value: object) -> list[object]:
        """Flip a bit where ranks meet after all is written, and before it is read back."""
        nonlocal damaged
        file = tmp_path / "out.writing" / "release" / "__0_0.distcp"
        if (file.parent / ".metadata").is_file() and not damaged:
            content = bytearray(file.read_bytes())
            begin = content.rindex(load_file(hf / "model.safetensors")["model.norm.weight"].view(torch.uint8).numpy().tobytes())
            content[begin] ^= 1
            file.write_bytes(content)
            damaged = True
        return [value]

    with pytest.raises(CheckpointError, match=r"with other bits|cannot be read"):
        Converter(conversion).run(Ranks(gather=damage), lambda nbytes: None)
    assert damaged and not (tmp_path / "out").exists() and not (tmp_path / "out.writing").exists()


@pytest.mark.parametrize(
    ("sizes", "shares"), [([4, 1, 1, 2], ["0", "123"]), ([2, 2], ["0", "1"]), ([1, 1, 1, 1, 4], ["0123", "4"]), ([], ["", ""])]
)
def test_ranks_share_bytes_in_order(sizes: list[int], shares: list[str]) -> None:
    jobs = [SimpleNamespace(unit=unit, nbytes=size) for unit, size in enumerate(sizes)]
    assert ["".join(str(job.unit) for job in share(jobs, rank, 2)) for rank in (0, 1)] == shares


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), num_ranks=st.integers(1, 6))
def test_every_job_has_one_rank_and_ranks_have_consecutive_jobs(sizes: list[int], num_ranks: int) -> None:
    class Sized(Job):
        @property
        def nbytes(self) -> int:
            return sizes[self.unit // 2]

    stream = Stream(kind="weights", source=None)  # type: ignore[arg-type]  # only sizes are looked at
    jobs = [Sized(stream=stream, names=(str(i),), unit=i // 2 * 2) for i in range(2 * len(sizes))]
    shares = [share(jobs, rank, num_ranks) for rank in range(num_ranks)]
    assert [job for jobs_of_rank in shares for job in jobs_of_rank] == jobs
    for jobs_of_rank in shares:
        total = sum(job.nbytes for job in jobs_of_rank)
        assert total <= sum(job.nbytes for job in jobs) / num_ranks + 2 * max(sizes)
