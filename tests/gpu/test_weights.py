"""Weights on a GPU: checksums against those of the host, and buckets shared with another process by CUDA IPC."""

from __future__ import annotations

import asyncio
import multiprocessing
import os

import pytest
import torch

from qwench.config.sections.engine import EngineConfig
from qwench.engines.client import HttpEngine
from qwench.engines.fleet.servers import ServerProcess, server_environ
from qwench.engines.kinds.embedded import embedded_command
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.weights.broadcast import BroadcastLink
from qwench.weights.plan import PublicationPlan
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress
from qwench.wire.checksum import tensor_checksums
from qwench.wire.portions import bucketed
from qwench.wire.shared_buffer import SharedBuffer, open_buffer
from tests.checksums import sglang_hash, tensor_checksum
from tests.contract.engine_hosts import make_model
from tests.fakes.orders import server_order
from tests.fakes.sglang_server import numpy_hash

pytestmark = [pytest.mark.gpu(1), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("num_elements", [0, 1, 7, 65_536, 65_537, 100_003, 2**24 + 1, 2**24 + 65_536 + 6])
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

    def weights(self, *, bucket_bytes: int, part: str = "merged"):
        return bucketed(((name, p.detach()) for name, p in self.model.named_parameters()), bucket_bytes=bucket_bytes)

    def shared_weights(self, part="merged"):
        return None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    yield from serving(tmp_path_factory, gpu=0)


@pytest.fixture(scope="module")
def distant_server(tmp_path_factory):
    yield from serving(tmp_path_factory, gpu=1)


def serving(tmp_path_factory, *, gpu: int):
    folder = tmp_path_factory.mktemp("model")
    make_model("qwen3", seed=3).bfloat16().save_pretrained(folder)
    build_small_tokenizer().save_pretrained(folder)
    command = embedded_command(
        server_order(folder, folder, dtype="bfloat16", embedded_kv_cache_tokens=4096, engine_start_timeout=300.0),
        index=0,
        gpu_ids=(gpu,),
        environ=server_environ(os.environ),
    )
    process = ServerProcess(command)
    try:
        yield process.start(), folder
    finally:
        process.stop()


@pytest.mark.parametrize("transport", ["nccl", "disk"])
def test_a_server_on_the_same_gpu_holds_what_was_published(server, transport):
    """`nccl` is the default, which is CUDA IPC here; every tensor is compared by its checksum."""
    assert publish_twice(*server, transport=transport) == 5


@pytest.mark.gpu(2)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_server_on_another_gpu_holds_what_was_broadcast(distant_server):
    assert publish_twice(*distant_server, transport="nccl") == 5


def publish_twice(url, folder, *, transport: str) -> int:
    """Publish versions 4 and 5, each compared by its checksums, and return the version that the server then tells."""
    source = Source(make_model("qwen3", seed=len(transport)).cuda().bfloat16())
    address = EngineAddress(base_url=url, token="secret", kind="embedded", placement=None)
    flags = EngineConfig(update_weight_buffer_size=20_000, update_weight_transport=transport)
    plan = PublicationPlan(engine=flags, model_folder=folder, timeout_s=60)
    link = BroadcastLink()
    try:
        for version in (4, 5):
            publish_from_rank(source, [address], version, plan, link=link)
    finally:
        link.close()
    return asyncio.run(told_version(address))


async def told_version(address: EngineAddress) -> int:
    engine = HttpEngine(address.base_url, token=address.token)
    try:
        return await engine.weight_version()
    finally:
        await engine.close()
