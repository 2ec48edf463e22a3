"""Buckets arrive as they were, whatever their dtypes, shapes and order, and leave nothing behind."""

from pathlib import Path

import pytest
import torch

from qwench.cluster import buckets
from qwench.cluster.buckets import make_exchange_folder, pack, unpack
from qwench.wire.memory_files import RANKS, own_prefix

BUCKET = [
    ("odd", torch.tensor([1, 2, 3], dtype=torch.uint8)),
    ("wide", torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)),
    ("turned", torch.arange(12, dtype=torch.float32).view(3, 4).t()),
    ("scalar", torch.tensor(2.5)),
    ("empty", torch.empty(0, 3)),
    ("flags", torch.tensor([True, False])),
]


@pytest.mark.parametrize("through_file", [True, False])
def test_tensors_arrive_as_they_were(tmp_path: Path, through_file: bool):
    packed = pack(BUCKET, folder=tmp_path if through_file else None)
    received = unpack(packed)
    assert [name for name, _ in received] == [name for name, _ in BUCKET]
    for (name, sent), (_, got) in zip(BUCKET, received, strict=True):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape), name
        assert torch.equal(got, sent), name
    assert list(tmp_path.iterdir()) == []


def test_memory_that_may_only_be_read_is_copied():
    packed = pack(BUCKET, folder=None)
    packed.content.flags.writeable = False
    received = unpack(packed)
    received[0][1].zero_()
    assert packed.content[:3].tolist() == [1, 2, 3]


def test_an_empty_bucket_arrives_empty(tmp_path: Path):
    assert unpack(pack([], folder=tmp_path)) == [] and pack([], folder=None).content.nbytes == 1


def test_buckets_go_to_disk_where_shared_memory_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(buckets.tempfile, "tempdir", None)
    room = buckets.shutil.disk_usage(buckets.memory_folder())
    for num_bytes, parent in ((2**60, tmp_path), (50, tmp_path), (49, buckets.memory_folder())):
        if num_bytes < 2**60:
            monkeypatch.setattr(buckets.shutil, "disk_usage", lambda _: room._replace(free=100))
        folder = make_exchange_folder(num_bytes)
        assert (folder.parent, folder.name.startswith(own_prefix(RANKS))) == (parent, True)
        folder.rmdir()
