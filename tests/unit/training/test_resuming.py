import json
import pickle
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from qwench.errors import CheckpointError, ConfigError
from qwench.training.resuming import (
    load_in_place,
    load_moments,
    load_rng,
    open_saved_optimizer,
    save_moments,
    save_rng,
    save_tensors,
)
from tests.unit.config.architectures import QWEN3_4B


class Runs:
    """Unpickled, it makes a file: what a hostile folder would do with any command."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self):
        return (Path.touch, (self._trace,))


def test_what_is_saved_is_loaded(tmp_path):
    save_tensors(tmp_path, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)})
    read = {"a": torch.zeros(2, 3), "b": torch.tensor(0)}
    load_in_place(tmp_path, read)
    assert read["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] and int(read["b"]) == 7


def test_a_rank_notes_the_checksum_of_the_file_it_wrote(tmp_path):
    save_tensors(tmp_path, {"a": torch.arange(6.0)})
    written = (tmp_path / "__0_0.distcp").read_bytes()
    assert json.loads((tmp_path / "__0.crc32.json").read_text()) == {"__0_0.distcp": zlib.crc32(written)}


def test_metadata_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    save_tensors(tmp_path / "saved", {"a": torch.zeros(3)})
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "trace")))
    with pytest.raises(CheckpointError, match=r"cannot be read .*pathlib.*touch|is no part of the format"):
        load_in_place(tmp_path / "saved", {"a": torch.zeros(3)})
    assert not (tmp_path / "trace").exists()


def test_metadata_may_not_make_readers_and_writers(tmp_path):
    class Writes:
        def __reduce__(self):
            return (dcp.FileSystemWriter, (tmp_path / "elsewhere",))

    save_tensors(tmp_path / "saved", {"a": torch.zeros(3)})
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(Writes()))
    with pytest.raises(CheckpointError, match="FileSystemWriter is no part of the format"):
        load_in_place(tmp_path / "saved", {"a": torch.zeros(3)})


def test_an_object_in_place_of_a_tensor_is_refused_and_runs_nothing(tmp_path):
    folder = tmp_path / "saved"
    save_tensors(folder, {"a": torch.zeros(3)})
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    (index,) = metadata.storage_data
    info = metadata.storage_data.pop(index)
    torch.save(Runs(tmp_path / "trace"), folder / info.relative_path)
    info.offset, info.length = 0, (folder / info.relative_path).stat().st_size
    metadata.storage_data[MetadataIndex("a")] = info
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="a is a pickled object instead of a tensor"):
        load_in_place(folder, {"a": torch.zeros(3)})
    assert not (tmp_path / "trace").exists()


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(OSError, match="unexpected pos 704 vs 598"):
        save_tensors(tmp_path, {"a": torch.zeros(3)})


def test_moments_of_another_optimizer_are_not_taken_for_those_of_another_model(tmp_path):
    save_moments(tmp_path, {"w.exp_avg": torch.ones(2), "w.exp_avg_sq": torch.ones(2)}, 3)
    with pytest.raises(ConfigError, match="has the moments of another optimizer; give the --optimizer of its run or"):
        load_moments(tmp_path, {"w.momentum": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="of the same model"):
        load_moments(tmp_path, {"v.exp_avg": torch.zeros(2)})


def test_generators_go_on_where_they_were_saved(tmp_path):
    torch.manual_seed(3)
    torch.rand(5)
    save_rng(tmp_path)
    drawn = torch.rand(4)
    torch.manual_seed(9)
    load_rng(tmp_path)
    assert torch.equal(torch.rand(4), drawn)


@pytest.mark.parametrize("content", [None, b"", b"not a state"])
def test_generators_that_cannot_be_read_name_the_flag_to_go_without(tmp_path, content):
    if content is not None:
        (tmp_path / "rng.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*rng\.pt .*pass --no-load-rng to go without"):
        load_rng(tmp_path)


@pytest.mark.parametrize("content", [[1], {"cpu": torch.zeros(1)}, {"cuda": []}])
def test_a_file_of_other_values_holds_no_generators(tmp_path, content):
    torch.save(content, tmp_path / "rng.pt")
    with pytest.raises(CheckpointError, match=r"rng\.pt \(it holds no states of generators\); pass --no-load-rng"):
        load_rng(tmp_path)


def test_weights_without_an_optimizer_name_the_flag_to_start_fresh(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was saved without its optimizer; pass --no-load-optim"):
        open_saved_optimizer(tmp_path, QWEN3_4B)


@pytest.mark.parametrize(("num_devices", "is_set"), [(2, True), (1, False)])
def test_generators_of_devices_are_set_where_as_many_are_there(tmp_path, monkeypatch, num_devices, is_set):
    states, taken = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", taken.extend)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    save_rng(tmp_path)
    load_rng(tmp_path)
    assert [state.tolist() for state in taken] == ([[1, 2], [3]] if is_set else [])


def test_generators_of_a_machine_without_devices_hold_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_rng(tmp_path)
    assert torch.load(tmp_path / "rng.pt", weights_only=True)["cuda"] == []
