"""Weights on a GPU: checksums against those of the host, and buckets shared with another process by CUDA IPC."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from qwench.engines.checksum import CHUNK_ELEMENTS, tensor_checksum, tensor_checksums
from qwench.engines.embedded.serving import ServerThread
from qwench.engines.placement import EngineAddress, placement_of
from qwench.engines.shared_buffer import SharedBuffer, open_buffer
from qwench.weights.rank_publication import publish_from_rank
from qwench.weights.settings import PublicationSettings
from qwench.weights.sglang_checksums import sglang_hash
from tests.contract.engine_hosts import make_engine, make_model
from tests.fakes.sglang_server import numpy_hash

pytestmark = [pytest.mark.gpu(1), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("num_elements", [0, 1, 7, 65_536, 65_537, 100_003, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 65_536 + 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_checksums_are_those_of_the_host(num_elements, dtype):
    tensor = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max, (num_elements,), dtype=dtype)
    assert tensor_checksum(tensor.cuda()) == tensor_checksum(tensor)


def test_many_checksums_at_once_are_those_of_each():
    named = [(str(n), torch.randn(n).bfloat16()) for n in (3, 70_000, 0, 12)]
    assert tensor_checksums((name, tensor.cuda()) for name, tensor in named) == tensor_checksums(named)


def test_sglangs_hash_is_that_of_the_host():
    tensor = torch.randn(5_000_001).bfloat16()
    assert sglang_hash(tensor.cuda()) == numpy_hash(tensor)


def _answer_checksums(connection) -> None:
    while (handle := connection.recv()) is not None:
        connection.send(tensor_checksum(open_buffer(handle)))


def test_another_process_reads_a_bucket_in_place():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_answer_checksums, args=(theirs,), daemon=True)
    process.start()
    for seed in range(4):
        buffer = SharedBuffer.allocate(3_000_001, DEVICE)
        buffer.tensor.copy_(torch.randint(0, 256, (3_000_001,), generator=torch.Generator().manual_seed(seed)))
        ours.send(buffer.handle())
        assert ours.poll(120) and ours.recv() == tensor_checksum(buffer.tensor)
        buffer.close()
    ours.send(None)
    process.join(60)
    assert process.exitcode == 0


class Source:
    def __init__(self, model) -> None:
        self.model = model

    def weights(self, *, bucket_bytes: int):
        yield [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]

    def shared_weights(self):
        return None


def test_disk_publication_to_an_engine_on_the_gpu(tmp_path: Path):
    model = make_model("qwen3").cuda().bfloat16()
    model.save_pretrained(tmp_path)
    engine = make_engine(make_model("qwen3", seed=3), device="cuda", dtype=torch.bfloat16)
    with ServerThread(engine, token="secret") as server:
        address = EngineAddress(base_url=server.base_url, token="secret", dialect="embedded", placement=placement_of(DEVICE))
        publish_from_rank(
            Source(model), [address], 4, PublicationSettings(transport="disk", model_folder=tmp_path, timeout_s=60)
        )
