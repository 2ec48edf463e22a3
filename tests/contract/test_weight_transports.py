"""Every way of the weights to an engine in another process, with real servers and, for several ranks, real trainer ranks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwench.config.sections.engine import EngineConfig
from qwench.engines.client import HttpEngine
from qwench.engines.fleet.servers import ServerProcess, server_environ
from qwench.engines.kinds.embedded import embedded_command
from qwench.errors import EngineError, EngineLostError, OutputError, WeightSyncError
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.weights.broadcast import BroadcastLink
from qwench.weights.plan import PublicationPlan
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress, Placement, host_name
from qwench.wire.flat_bucket import entries_of, entries_to_json, flatten_into, size_bytes
from qwench.wire.portions import WeightBucket, bucketed
from qwench.wire.shared_buffer import SharedBuffer
from tests.contract.engine_hosts import ask, distribution, make_engine, make_model, prompt_of
from tests.contract.weight_ranks import Publication, publish_from_ranks
from tests.deadlines import patient
from tests.fakes.orders import server_order

TOKEN = "secret"
TRANSPORTS = ("ipc", "broadcast", "disk")
HANGS_S = patient(0.4)
"""The deadline of an engine that does not answer; the one beside it must keep it."""
SMALL_BUCKETS = 20_000
"""Bytes; the tiny model then takes about ten buckets."""
REQUEST = ask("r", prompt_of(9), seed=5, ignore_eos=True, max_new_tokens=24)


class Source:
    """Gives away the weights of a model."""

    def __init__(self, seed: int) -> None:
        self.model = make_model("qwen3", seed=seed)

    def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[WeightBucket]:
        return bucketed(((name, p.detach()) for name, p in self.model.named_parameters()), bucket_bytes=bucket_bytes)

    def shared_weights(self, part: str = "merged") -> dict[str, Tensor] | None:
        return None


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("qwen3", seed=0).save_pretrained(folder)
    build_small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers(model_folder, tmp_path_factory) -> Iterator[list[ServerProcess]]:
    logs = tmp_path_factory.mktemp("logs")
    order = server_order(model_folder, logs, token=TOKEN, embedded_kv_cache_tokens=4096, engine_start_timeout=patient(120))
    commands = [
        embedded_command(order, index=index, gpu_ids=(), environ=server_environ(os.environ, OMP_NUM_THREADS="1"))
        for index in range(2)
    ]
    started = [ServerProcess(command) for command in commands]
    try:
        for server, command in zip(started, commands, strict=True):
            server.log_file = command.log_file
            server.launch()
        for server in started:
            server.url = server.wait_until_healthy()
        yield started
    finally:
        for server in started:
            server.stop()


def address_of(url: str, *, token: str = TOKEN, placement: Placement | None = None) -> EngineAddress:
    return EngineAddress(base_url=url, token=token, kind="embedded", placement=placement)


def settings(transport: str, model_folder: Path, *, timeout_s: float = patient(30), **flags) -> PublicationPlan:
    sizes = {"update_weight_buffer_size": SMALL_BUCKETS, "update_weight_transport": transport}
    return PublicationPlan(engine=EngineConfig(**(sizes | flags)), model_folder=model_folder, timeout_s=timeout_s)


def generated(url: str):
    """Return what the server makes of the request, and the version it says it has."""

    async def scenario():
        engine = HttpEngine(url, token=TOKEN)
        result, version = await engine.generate(REQUEST), await engine.weight_version()
        await engine.close()
        return result, version

    return asyncio.run(scenario())


def expected(model):
    """Return what an engine with exactly these weights makes of the request."""

    async def scenario():
        engine = make_engine(model, page_size=16)
        result = await engine.generate(REQUEST)
        await engine.close()
        return result

    return asyncio.run(scenario())


def assert_holds(url: str, source: Source, version: int) -> None:
    """The same engine code with the same bits gives the same bits."""
    result, held = generated(url)
    reference = expected(source.model)
    assert held == version and set(result.weight_versions) == {version}
    assert list(result.output_ids) == list(reference.output_ids)
    assert list(result.log_probs) == list(reference.log_probs)


@pytest.mark.parametrize("transport", ["nccl", *TRANSPORTS])
def test_engines_hold_exactly_what_was_published(servers, model_folder, transport):
    version = 10 + ("nccl", *TRANSPORTS).index(transport)
    source = Source(seed=version)
    publish_from_rank(source, [address_of(server.url) for server in servers], version, settings(transport, model_folder))
    for server in servers:
        assert_holds(server.url, source, version)
    other = distribution(Source(seed=version + 1).model, REQUEST.input_ids)
    assert not torch.equal(other, distribution(source.model, REQUEST.input_ids))


def test_a_group_stands_from_one_publication_to_the_next_and_is_joined_again_by_an_engine_started_anew(servers, model_folder):
    addresses = [address_of(server.url) for server in servers]
    link, flags = BroadcastLink(), settings("broadcast", model_folder)
    joined_before = [num_joins(server) for server in servers]
    try:
        for version in (22, 23):
            publish_from_rank(Source(seed=version), addresses, version, flags, link=link)
        assert [num_joins(server) for server in servers] == [before + 1 for before in joined_before]
        servers[1].stop()
        servers[1].start()
        addresses[1] = replace(addresses[1], start=1)
        publish_from_rank(Source(seed=24), addresses, 24, flags, link=link)
        assert [num_joins(server) for server in servers] == [before + 2 for before in joined_before]
    finally:
        link.close()
    for server in servers:
        assert_holds(server.url, Source(seed=24), 24)


def num_joins(server: ServerProcess) -> int:
    """Return how often a server was asked to join a group, over all its lives."""
    return server.log_file.read_text().count("POST /init_weights_update_group")


def test_one_bucket_is_first_and_last(servers, model_folder):
    source = Source(seed=20)
    one_bucket = settings("ipc", model_folder, update_weight_buffer_size=2**30)
    publish_from_rank(source, [address_of(servers[0].url)], 20, one_bucket)
    assert_holds(servers[0].url, source, 20)


def test_disk_files_are_kept_on_request_and_gone_otherwise(servers, model_folder, tmp_path):
    for keep in (True, False):
        into = settings("disk", model_folder, update_weight_disk_dir=str(tmp_path), update_weight_disk_keep_files=keep)
        publish_from_rank(Source(seed=21), [address_of(servers[0].url)], 21 + keep, into)
    assert [path.name for path in tmp_path.iterdir()] == ["weights_0000022"]


def test_disk_files_of_no_named_folder_are_gone_with_their_folder(servers, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    publish_from_rank(Source(seed=23), [address_of(servers[0].url)], 25, settings("disk", model_folder))
    assert_holds(servers[0].url, Source(seed=23), 25)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_folder_that_cannot_be_written_is_named(servers, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    into = settings("disk", model_folder, update_weight_disk_dir=str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"--update-weight-disk-dir .*/file cannot be written to \(Not a directory"):
        publish_from_rank(Source(seed=21), [address_of(servers[0].url)], 26, into)


def test_several_ranks_publish_their_shards_and_fail_together(servers, model_folder, tmp_path):
    addresses = [address_of(server.url) for server in servers]
    stranger = [addresses[0], replace(addresses[1], token="guess")]
    publications = [
        Publication(addresses=addresses, version=30 + index, plan=settings(transport, model_folder))
        for index, transport in enumerate(TRANSPORTS)
    ]
    refused = Publication(addresses=stranger, version=40, plan=settings("ipc", model_folder))
    outcomes = publish_from_ranks(
        model_folder, [*publications[:2], refused, publications[2]], num_ranks=2, work_folder=tmp_path
    )
    for outcome in outcomes:
        assert [outcome[0], outcome[1], outcome[3]] == ["ok", "ok", "ok"]
        assert "token" in outcome[2]
    for server in servers:
        assert_holds(server.url, Source(seed=0), 32)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_the_runs_token_no_weights_change(servers, model_folder, transport):
    publish_from_rank(Source(seed=50), [address_of(servers[0].url)], 50, settings("ipc", model_folder))
    with pytest.raises(EngineError, match="token"):
        publish_from_rank(Source(seed=51), [address_of(servers[0].url, token="guess")], 51, settings(transport, model_folder))
    assert_holds(servers[0].url, Source(seed=50), 50)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_weights_of_another_model_are_refused_by_name(servers, model_folder, transport):
    publish_from_rank(Source(seed=50), [address_of(servers[0].url)], 52, settings("ipc", model_folder))
    source = Source(seed=53)
    source.model.model.norm.weight = torch.nn.Parameter(torch.ones(33))
    found = (
        r"holds model.norm.weight in the shape \[33\]"
        if transport == "disk"
        else r"weight 'model.norm.weight' has shape \(33,\)"
    )
    with pytest.raises(WeightSyncError, match=rf"refused the weights: .*{found}"):
        publish_from_rank(source, [address_of(servers[0].url)], 53, settings(transport, model_folder))
    # Earlier buckets were taken over already: nothing is generated until a whole version is here again. The disk's come as one.
    assert asyncio.run(_health(servers[0].url)) is (transport == "disk")
    publish_from_rank(Source(seed=50), [address_of(servers[0].url)], 54, settings("ipc", model_folder))
    assert_holds(servers[0].url, Source(seed=50), 54)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_that_hangs_is_given_up_at_its_deadline(servers, model_folder, transport):
    here = Placement(host=host_name(), devices=("cpu",))
    hung, well = servers
    group = hung.process_group
    assert group is not None
    os.killpg(group, signal.SIGSTOP)
    try:
        addresses = [address_of(server.url, placement=here) for server in (hung, well)]
        with pytest.raises(EngineLostError, match=rf"{hung.url}\) did not answer /\w+ within {HANGS_S:g} s"):
            publish_from_rank(Source(seed=60), addresses, 60, settings(transport, model_folder, timeout_s=HANGS_S))
    finally:
        os.killpg(group, signal.SIGCONT)
    assert not list(Path("/dev/shm").glob(f"qwench-weights-{os.getpid()}-*"))
    again = [address_of(server.url) for server in servers]
    publish_from_rank(Source(seed=61), again, 61, settings(transport, model_folder))
    for server in servers:
        assert_holds(server.url, Source(seed=61), 61)


def test_an_engine_that_does_not_tell_its_devices_counts_as_lost(model_folder):
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it accepts, and never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(EngineLostError, match=rf"an engine did not tell its devices within {HANGS_S:g} s"):
            publish_from_rank(Source(seed=70), [address_of(url)], 70, settings("ipc", model_folder, timeout_s=HANGS_S))


def test_an_engine_that_is_gone_is_named(model_folder):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(EngineLostError, match=rf"{url}\) cannot be reached"):
        publish_from_rank(Source(seed=1), [address_of(url)], 1, settings("nccl", model_folder))


def test_a_tensor_damaged_on_its_way_is_found_and_named(servers, model_folder):
    with damaging_proxy(servers[0].url) as url:
        found = r"weight version 70: tensor '[\w.]+' of HttpEngine.* \(1 of 24 tensors differ\)"
        with pytest.raises(WeightSyncError, match=found):
            publish_from_rank(Source(seed=70), [address_of(url)], 70, settings("ipc", model_folder))
    publish_from_rank(Source(seed=70), [address_of(servers[0].url)], 71, settings("ipc", model_folder))


def test_buckets_that_overtake_each_other_on_the_way_are_loaded_in_order(servers):
    """Every bucket is asked for before the one that must be loaded first, over a connection of its own."""
    source = Source(seed=75)
    buckets = list(source.weights(bucket_bytes=SMALL_BUCKETS))
    buffers, bodies = [], []
    for index, bucket in enumerate(buckets):
        entries = entries_of(bucket)
        buffers.append(SharedBuffer.allocate(size_bytes(entries), torch.device("cpu")))
        flatten_into(buffers[-1].tensor, bucket, entries)
        described = {"shared_buffer": buffers[-1].handle(), "entries": entries_to_json(entries)}
        bodies.append({**described, "weight_version": "75", "index": index, "final": index == len(buckets) - 1})

    async def scenario():
        engine = HttpEngine(servers[0].url, token=TOKEN)
        for early, late in zip(bodies[0:6:2], bodies[1:6:2], strict=True):
            overtaking = asyncio.create_task(engine.post("/update_weights_from_tensor", late))
            await asyncio.sleep(0.1)
            assert not overtaking.done()
            await asyncio.gather(engine.post("/update_weights_from_tensor", early), overtaking)
        await engine.post("/update_weights_from_tensor", bodies[-1])
        await engine.close()

    assert len(bodies) == 7
    asyncio.run(scenario())
    for buffer in buffers:
        buffer.close()
    assert_holds(servers[0].url, source, 75)


def test_buckets_out_of_order_are_refused(servers):
    buffer = SharedBuffer.allocate(1, torch.device("cpu"))
    body = {"shared_buffer": buffer.handle(), "entries": [], "weight_version": "80", "index": 3}
    assert "bucket 3 of weight version 80 arrived" in call(servers[0].url, body)
    assert "entries" in call(servers[0].url, {"shared_buffer": buffer.handle(), "weight_version": "80"})
    buffer.close()
    assert "cannot be opened" in call(servers[0].url, {**body, "index": 0})


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/shm/../../etc/passwd", "/tmp/qwench-weights-x", "/dev/shm/other"])
def test_only_shared_buffers_of_ours_are_opened(servers, path):
    handle = {"kind": "file", "path": path, "num_bytes": 16}
    body = {"shared_buffer": handle, "entries": [], "weight_version": "81", "index": 0}
    assert "cannot be opened" in call(servers[0].url, body)


def call(url: str, body: dict) -> str:
    """Return what the server says against a bucket."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    request = urllib.request.Request(url + "/update_weights_from_tensor", data=json.dumps(body).encode(), headers=headers)
    try:
        urllib.request.urlopen(request, timeout=patient(20))
    except urllib.error.HTTPError as refused:
        return refused.read().decode()
    raise AssertionError("the server took it")


async def _health(url: str) -> bool:
    engine = HttpEngine(url)
    healthy = await engine.health()
    await engine.close()
    return healthy


class damaging_proxy:  # noqa: N801 - used as a function
    """Passes requests on to a server; flips one bit of the second bucket on the way."""

    def __init__(self, target: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
                said = json.loads(body) if body else {}
                if said.get("index") == 1:
                    with Path(said["shared_buffer"]["path"]).open("r+b") as buffer:
                        first = buffer.read(1)[0]
                        buffer.seek(0)
                        buffer.write(bytes([first ^ 1]))
                headers = {name: self.headers[name] for name in ("Content-Type", "Authorization") if name in self.headers}
                request = urllib.request.Request(target + self.path, data=body, headers=headers, method=self.command)
                with urllib.request.urlopen(request, timeout=patient(20)) as answer:
                    content = answer.read()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _pass_on  # noqa: N815 - http.server's names

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
