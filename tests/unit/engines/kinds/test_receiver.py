"""What receivers send to a server, which refusals they accept, and when weights count as confirmed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest
import torch

from qwench.engines.kinds.embedded import EmbeddedReceiver
from qwench.engines.kinds.receiver import HttpReceiver
from qwench.engines.protocol import Portion
from qwench.errors import EngineError, EngineLostError, WeightSyncError
from qwench.wire.addresses import EngineAddress, Placement
from qwench.wire.flat_bucket import entries_of, entries_to_json
from qwench.wire.shared_buffer import SharedBuffer
from tests.checksums import tensor_checksum

BUCKET = [("norm", torch.ones(3)), ("head", torch.arange(4.0).view(2, 2))]
CHECKSUMS = {name: tensor_checksum(tensor) for name, tensor in BUCKET}
PORTION = Portion(version=7, index=2, final=True)
HERE = Placement(host="a", devices=("cpu",))


class Server:
    """Answers every request with the same, or refuses it, and keeps what it was sent."""

    def __init__(self, answer: object = None, *, refusal: Exception | None = None, placement: dict | None = None) -> None:
        self.requests: list[tuple[str, dict, float]] = []
        self.closed = False
        self._answer, self._refusal, self._placement = answer, refusal, placement

    def __repr__(self) -> str:
        return "engine a"

    async def post(self, path: str, body: dict, *, timeout_s: float) -> object:
        self.requests.append((path, body, timeout_s))
        if self._refusal is not None:
            raise self._refusal
        return self._answer

    async def server_info(self) -> dict:
        return {"placement": self._placement}

    async def close(self) -> None:
        self.closed = True


def receiver_of(server: Server, kind=EmbeddedReceiver, *, timeout_s: float = 50.0, placement: Placement | None = HERE):
    address = EngineAddress(base_url="http://a:1", token=None, kind="embedded", placement=placement)
    receiver = kind(address, timeout_s=timeout_s)
    receiver.engine = server
    return receiver


@pytest.mark.parametrize(("kind", "own"), [(HttpReceiver, {}), (EmbeddedReceiver, {"timeout_s": 9.0})])
def test_an_engine_joins_with_its_first_rank_and_the_size_of_the_group(kind, own):
    server = Server({})
    join = {"address": "10.0.0.5", "port": 4000, "rank": 3, "size": 5, "backend": "gloo", "timeout_s": 9.0}
    asyncio.run(receiver_of(server, kind).join("weights", **join))
    body = {
        "master_address": "10.0.0.5",
        "master_port": 4000,
        "rank_offset": 3,
        "world_size": 5,
        "group_name": "weights",
        "backend": "gloo",
        **own,
    }
    assert server.requests == [("/init_weights_update_group", body, 50.0)]


def test_an_engine_that_is_in_no_group_has_left_it():
    for said in ("there is no weight group 'weights'", "Group weights does not exist."):
        asyncio.run(receiver_of(Server(refusal=EngineError(said))).leave("weights"))
    for failure in (EngineError("out of memory"), EngineLostError("there is no weight group: gone")):
        with pytest.raises(type(failure), match=str(failure)):
            asyncio.run(receiver_of(Server(refusal=failure)).leave("weights"))


@pytest.mark.parametrize(("timeout_s", "asked"), [(50.0, 30.0), (5.0, 5.0)])
def test_leaving_has_a_short_deadline(timeout_s, asked):
    server = Server()
    asyncio.run(receiver_of(server, timeout_s=timeout_s).leave("weights"))
    assert server.requests == [("/destroy_weights_update_group", {"group_name": "weights"}, asked)]


def test_a_bucket_that_is_broadcast_is_described_by_names_dtypes_and_shapes():
    server = Server({})
    asyncio.run(receiver_of(server).take_broadcast("weights", entries_of(BUCKET), PORTION))
    body = {
        "names": ["norm", "head"],
        "dtypes": ["float32", "float32"],
        "shapes": [[3], [2, 2]],
        "group_name": "weights",
        "load_format": "flattened_bucket",
        "weight_version": "7",
        "index": 2,
        "final": True,
    }
    assert server.requests == [("/update_weights_from_distributed", body, 50.0)]


def test_a_shared_buffer_is_offered_by_one_handle_however_often_it_is_used():
    server, buffer, other = Server({}), *(SharedBuffer.allocate(64, torch.device("cpu")) for _ in range(2))
    try:
        receiver = receiver_of(server)
        offers = [receiver.offer(one, entries_of(BUCKET)) for one in (buffer, other, buffer)]
        assert offers[0] == offers[2] != offers[1]
        asyncio.run(receiver.take_shared(offers[1:2], PORTION))
        with pytest.raises(ValueError, match="too many values"):
            asyncio.run(receiver.take_shared(offers, PORTION))
    finally:
        buffer.close()
        other.close()
    [(path, body, _)] = server.requests
    assert path == "/update_weights_from_tensor"
    assert body == {**orjson.loads(offers[1]), "weight_version": "7", "index": 2, "final": True}
    assert body["shared_buffer"] == {"kind": "file", "path": str(other.file), "num_bytes": 64}
    assert body["entries"] == orjson.loads(orjson.dumps(entries_to_json(entries_of(BUCKET))))


def test_a_buffer_is_offered_once_what_was_written_is_there():
    class Buffer:
        written = False

        def wait_for_writes(self) -> None:
            self.written = True

        def handle(self) -> dict[str, bool]:
            return {"is written": self.written}

    offer = receiver_of(Server({})).offer(Buffer(), [])
    assert orjson.loads(offer) == {"shared_buffer": {"is written": True}, "entries": []}


def test_as_many_buckets_are_under_way_as_the_server_puts_in_order():
    receiver = receiver_of(Server())
    assert [receiver.window(transport) for transport in ("ipc", "broadcast", "disk")] == [2, 3, 1]
    assert HttpReceiver(receiver.address, timeout_s=1.0).window("ipc") == 1


def test_the_server_is_asked_where_it_runs_only_when_the_run_does_not_know():
    server = Server(placement={"host": "b", "devices": ["cpu", "cpu"]})
    assert asyncio.run(receiver_of(server).placement()) == HERE
    unknown = receiver_of(server, placement=None)
    assert asyncio.run(unknown.placement()) == Placement(host="b", devices=("cpu", "cpu"))


def test_the_first_device_of_an_engine_receives_for_all():
    wide = Placement(host="a", devices=("gpu 0", "gpu 1"))
    found = asyncio.run(receiver_of(Server(), placement=wide).placement())
    assert found == Placement(host="a", devices=("gpu 0",))


def test_a_receiver_speaks_to_its_address_and_has_one_rank():
    address = EngineAddress(base_url="http://a:1", token="secret", kind="embedded", placement=HERE)
    receiver = HttpReceiver(address, timeout_s=1.0)
    assert (receiver.address, receiver.engine.address, receiver.num_ranks) == (address, address, 1)
    assert asyncio.run(receiver.placement()) == HERE


def test_the_connection_is_closed():
    server = Server()
    asyncio.run(receiver_of(server).close())
    assert server.closed


def confirm(answer: object) -> None:
    receiver = receiver_of(Server(answer))
    ledger = receiver.make_ledger()
    ledger.note(BUCKET)

    async def load_and_confirm() -> None:
        await receiver.take_folder(Path("/weights"), version=7)
        await receiver.confirm(ledger, version=7)

    asyncio.run(load_and_confirm())


def test_weights_are_confirmed_by_version_and_by_every_checksum():
    confirm({"weight_version": "7", "checksums": CHECKSUMS})
    for answer in ({}, None, {"weight_version": "7"}):
        with pytest.raises(WeightSyncError, match="engine a did not confirm weight version 7"):
            confirm(answer)
    with pytest.raises(WeightSyncError, match="engine a confirmed weight version 6 when 7 was published"):
        confirm({"weight_version": "6", "checksums": CHECKSUMS})
    with pytest.raises(WeightSyncError, match=r"tensor 'head' of engine a has checksum 5, .* \(1 of 2 tensors differ\)"):
        confirm({"weight_version": "7", "checksums": {**CHECKSUMS, "head": 5}})
    with pytest.raises(WeightSyncError, match=r"tensor 'head' of engine a has checksum None, .* \(2 of 2 tensors differ\)"):
        confirm({"weight_version": "7", "checksums": {}})


def test_an_adapter_is_loaded_given_its_version_and_those_before_it_are_forgotten():
    server = Server({"loaded_adapters": {"b": "/b"}})
    asyncio.run(receiver_of(server).take_adapter(Path("/b"), "b", version=7, retired=["a", "z"]))
    assert server.requests == [
        ("/load_lora_adapter", {"lora_name": "b", "lora_path": "/b"}, 50.0),
        ("/update_weight_version", {"new_version": "7", "abort_all_requests": False}, 50.0),
        ("/unload_lora_adapter", {"lora_name": "a"}, 50.0),
        ("/unload_lora_adapter", {"lora_name": "z"}, 50.0),
    ]
    for loaded in ({"loaded_adapters": {"a": "/a"}}, {"loaded_adapters": None}, {}):
        with pytest.raises(WeightSyncError, match=f"engine a does not name 'b' .*{loaded.get('loaded_adapters')}"):
            asyncio.run(receiver_of(Server(loaded)).take_adapter(Path("/b"), "b", version=7, retired=[]))
    for said in ("there is no adapter 'a'", "Adapter a does not exist."):
        asyncio.run(receiver_of(Server(refusal=EngineError(said))).forget_adapter("a"))
    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(receiver_of(Server(refusal=EngineError("out of memory"))).forget_adapter("a"))


def test_a_folder_is_loaded_by_its_path_and_version():
    server = Server({})
    asyncio.run(receiver_of(server).take_folder(Path("/weights"), version=7))
    assert server.requests == [("/update_weights_from_disk", {"model_path": "/weights", "weight_version": "7"}, 50.0)]
    assert receiver_of(server).ledger_kind == "embedded"
