"""Which path asks what of the engine, and what each answers; the engine notes what it is asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch

from qwench.engines.embedded.http import server, weight_routes
from qwench.engines.embedded.http.server import EngineServer
from qwench.engines.protocol import EngineStats, FinishReason, GenerateRequest, GenerateResult, SamplingParams, WeightReceipt
from qwench.errors import CheckpointError, EngineError

SIZES = SimpleNamespace(vocab_size=100, hidden_size=8, num_layers=3, max_positions=64)
CHECKSUMS = {"norm": 5}


class NotingEngine:
    """Notes every call; answers as its attributes say."""

    device, architecture, tokenizer = torch.device("cpu"), SIZES, None

    def __init__(self) -> None:
        self.adapters = SimpleNamespace(folders={"mine": "/lora"})
        self.noted: list[tuple[object, ...]] = []
        self.healthy, self.version, self.failure = True, 4, None

    def __getattr__(self, name: str):
        async def note(*arguments: object, **keywords: object) -> object:
            self.noted.append((name, *arguments, *keywords.items()))
            if self.failure is not None:
                raise self.failure
            answers = {"health": self.healthy, "weight_version": self.version, "stats": EngineStats(num_pages=7)}
            return answers.get(name)

        return note

    async def update_weights(self, buckets: object, *, version: int) -> WeightReceipt:
        self.noted.append(("update_weights", buckets, version))
        return WeightReceipt(version=version, checksums=CHECKSUMS)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.noted.append(("generate", request))
        if self.failure is not None:
            raise self.failure
        return GenerateResult(
            request_id="r", output_ids=[1], log_probs=[-1.0], finish_reason=FinishReason.LENGTH, weight_versions=[4]
        )


@pytest.fixture
def engine() -> NotingEngine:
    return NotingEngine()


def ask(
    engine: NotingEngine, path: str, body: object = None, *, method: str = "POST", token: str | None = None, raw: bytes = b"",
    kind: bytes = b"application/json", query: bytes = b"",
) -> tuple[int, Any]:  # fmt: skip
    """Send one request to the application, and return status and answer."""
    app = EngineServer(engine, model_path="/models/tiny", token=token, adapters={}).app()
    content = raw or (b"" if body is None else orjson.dumps(body))
    headers = [(b"host", b"127.0.0.1:1"), (b"content-type", kind), (b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query,
             "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1), "scheme": "http",
             "http_version": "1.1", "root_path": "", "asgi": {"version": "3.0"}}  # fmt: skip
    sent: list[dict[str, Any]] = []
    bodies = [content]

    async def receive() -> dict[str, object]:
        if not bodies:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    answer = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], orjson.loads(answer) if answer[:1] in (b"{", b"[") else answer.decode()


PAUSED = {"status": "ok", "message": "generation is paused"}


@pytest.mark.parametrize(
    ("path", "body", "calls", "answer"),
    [
        ("/pause_generation", {}, [("pause", ("retract", False)), ("abort",)], PAUSED),
        ("/pause_generation", {"mode": "in_place"}, [("pause", ("retract", False))], PAUSED),
        ("/pause_generation", {"mode": "retract"}, [("pause", ("retract", True))], PAUSED),
        ("/continue_generation", None, [("resume",)], {"status": "ok", "message": "generation goes on"}),
        ("/abort_request", {"rid": "a"}, [("abort", "a", ("begins", True))], ""),
        ("/abort_request", {"rid": "a", "abort_all": True}, [("abort", None, ("begins", True))], ""),
        ("/flush_cache", None, [("flush_cache",)], "Cache flushed.\n"),
        ("/release_memory_occupation", {"tags": ["weights"]}, [("sleep", ["weights"]), ("release_cache",)], ""),
        ("/release_memory_occupation", {}, [("sleep", ["weights", "kv_cache"]), ("release_cache",)], ""),
        ("/resume_memory_occupation", None, [("wake", ["weights", "kv_cache"])], ""),
        (
            "/update_weight_version",
            {"new_version": "9"},
            [("abort",), ("set_version", 9)],
            {"success": True, "message": "Weight version updated to 9", "new_version": "9"},
        ),
        (
            "/update_weight_version",
            {"new_version": "9", "abort_all_requests": False},
            [("set_version", 9)],
            {"success": True, "message": "Weight version updated to 9", "new_version": "9"},
        ),
    ],
)
def test_each_path_asks_its_own_of_the_engine(path, body, calls, answer, engine):
    assert ask(engine, path, body) == (200, answer)
    assert engine.noted == calls
    assert ask(NotingEngine(), path, body, token="secret")[0] == 401


@pytest.mark.parametrize("path", ["/flush_cache", "/release_memory_occupation", "/resume_memory_occupation"])
def test_memory_may_be_asked_for_by_get_too(path, engine):
    assert ask(engine, path, method="GET")[0] == 200


def test_information_is_for_everybody(engine):
    model = {
        "model_path": "/models/tiny", "is_generation": True, "weight_version": "4", "vocab_size": 100, "hidden_size": 8,
        "num_hidden_layers": 3,
    }  # fmt: skip
    info = {"model_path": "/models/tiny", "weight_version": "4", "context_length": 64}
    for path in ("/model_info", "/get_model_info"):
        assert ask(engine, path, method="GET", token="secret") == (200, model)
    for path in ("/server_info", "/get_server_info"):
        status, found = ask(engine, path, method="GET", token="secret")
        assert (status, found.pop("stats")["num_pages"], found.pop("placement")["devices"]) == (200, 7, ["cpu"])
        assert found == info
    assert ask(engine, "/get_weight_version", method="GET") == (200, {"weight_version": "4"})
    status, text = ask(engine, "/metrics", method="GET")
    assert status == 200 and 'qwench:weight_version{model_name="/models/tiny"} 4\n' in text


def test_health_is_that_of_the_engine_or_of_one_token(engine):
    assert ask(engine, "/health", method="GET") == (200, "")
    assert ask(engine, "/health_generate", method="GET") == (200, "")
    probe = GenerateRequest(request_id="health-1", input_ids=[0], sampling=SamplingParams(max_new_tokens=1, temperature=0.0))
    assert engine.noted[-1] == ("generate", probe)
    engine.healthy = False
    assert ask(engine, "/health", method="GET") == (503, "")
    engine.failure = EngineError("no weights")
    assert ask(engine, "/health_generate", method="GET") == (503, "no weights")


@pytest.mark.parametrize(("healthy", "status", "kind"), [(True, 400, "invalid_request_error"), (False, 503, "server_error")])
def test_a_healthy_engine_has_refused_and_another_one_has_failed(healthy, status, kind, engine, monkeypatch):
    engine.healthy = healthy

    async def refuse(*_: object, **__: object) -> None:
        raise EngineError("not now")

    engine.sleep = refuse
    answer = {"error": {"message": "not now", "type": kind, "param": None, "code": None}}
    assert ask(engine, "/release_memory_occupation") == (status, answer)


def test_a_checkpoint_folder_is_read_as_the_next_version_or_the_one_that_is_named(engine, monkeypatch):
    def read(folder: Path, architecture: object) -> str:
        assert architecture is SIZES
        if folder.name == "broken":
            raise CheckpointError("half a file")
        return f"buckets of {folder}"

    monkeypatch.setattr(weight_routes, "read_folder", read)
    for body, version in (({"model_path": "/b"}, 5), ({"model_path": "/b", "weight_version": "12"}, 12)):
        confirmed = {"success": True, "message": f"weight version {version} is in use", "weight_version": version}
        assert ask(engine, "/update_weights_from_disk", body) == (200, confirmed | {"checksums": CHECKSUMS})
        assert engine.noted[-1] == ("update_weights", "buckets of /b", version)
    refused = {"success": False, "message": "model_path '/broken' cannot be read (half a file)."}
    assert ask(engine, "/update_weights_from_disk", {"model_path": "/broken"}) == (400, refused)


def test_a_new_folder_names_the_model_from_then_on(engine, monkeypatch):
    monkeypatch.setattr(weight_routes, "read_folder", lambda folder, architecture: [])
    made = EngineServer(engine, model_path="/a", token="", adapters={})
    asyncio.run(made._weight_routes.update_from_disk(weight_routes.DiskBody(model_path="/b")))
    assert orjson.loads(asyncio.run(made.model_info()).body)["model_path"] == "/b"
    assert made._token is None, "an empty token is none"


@pytest.mark.parametrize("version", ["", "-1", "1.5", "x", "1" * 19, "\u0663"])
def test_a_version_is_a_number_of_few_digits(version, engine):
    status, answer = ask(engine, "/update_weight_version", {"new_version": version})
    expected = f"weight_version must be a number from 0 on, of at most 18 digits, got {version!r}."
    assert (status, answer["error"]["message"]) == (400, expected)
    assert weight_routes.read_version("1" * 18) == int("1" * 18)


def broadcast(**changes: object) -> dict[str, object]:
    wide = {"names": ["a", "b"], "dtypes": ["float32", "torch.bfloat16"], "shapes": [[2], [3]]}
    return {**wide, "load_format": "flattened_bucket", "weight_version": "7", **changes}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (
            "/update_weights_from_distributed",
            broadcast(),
            400,
            "there is no weight group 'weight_update_group'; call /init_weights_update_group first.",
        ),
        ("/destroy_weights_update_group", {}, 400, "there is no weight group 'weight_update_group'"),
        ("/pause_generation", {"mode": "x"}, 400, "mode 'x' is not supported; known: abort, in_place, retract."),
        ("/abort_request", {}, 400, "send rid, or abort_all: true."),
    ],
)
def test_what_cannot_be_done_is_refused(path, body, status, said, engine):
    found, answer = ask(engine, path, body)
    record = answer.get("error", answer)
    assert (found, record["message"], answer.get("success", False)) == (status, said, False)
    assert engine.noted == []


class Group:
    """A weight group that was joined."""

    def __init__(self) -> None:
        self.closed = False

    def start(self, buffer: torch.Tensor):
        assert (buffer.dtype, buffer.numel()) == (torch.uint8, 2 * 4 + 3 * 2)
        return lambda: buffer.fill_(0)

    def close(self) -> None:
        self.closed = True


def routes_of(engine: NotingEngine) -> weight_routes.WeightRoutes:
    return EngineServer(engine, model_path="/a", token=None, adapters={})._weight_routes


def test_a_broadcast_bucket_is_received_in_its_group_and_answered_alone_or_confirmed(engine):
    taken = []

    async def receive_bucket(read, portion) -> WeightReceipt | None:
        taken.append(([(name, tensor.tolist(), tensor.dtype) for name, tensor in read()], portion.version, portion.index))
        return WeightReceipt(version=7, checksums=CHECKSUMS) if portion.final else None

    engine.receive_bucket = receive_bucket
    routes = routes_of(engine)
    routes._groups["weight_update_group"] = group = Group()
    told = []
    for index, final in ((0, False), (1, True)):
        body = weight_routes.BroadcastBody(**broadcast(index=index, final=final))
        told.append(orjson.loads(asyncio.run(routes.update_from_distributed(body)).body))
    tensors = [("a", [0.0, 0.0], torch.float32), ("b", [0.0] * 3, torch.bfloat16)]
    assert taken == [(tensors, 7, 0), (tensors, 7, 1)]
    assert told == [
        {"success": True, "message": "bucket 0 of weight version 7 is here"},
        {"success": True, "message": "weight version 7 is in use", "weight_version": 7, "checksums": CHECKSUMS},
    ]
    left = orjson.loads(asyncio.run(routes.destroy_group(weight_routes.GroupNameBody())).body)
    assert (left, group.closed, routes._groups) == (
        {"success": True, "message": "left weight group 'weight_update_group'"}, True, {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_format": None}, "load_format must be flattened_bucket, got None."),
        ({"dtypes": ["float32", "load"]}, "'load' is not a dtype."),
        (
            {"names": ["a"]},
            "a bucket must list each tensor's name, dtype and shape; it has 1 names, 2 dtypes and 2 shapes.",
        ),
        (
            {"shapes": []},
            "a bucket must list each tensor's name, dtype and shape; it has 2 names, 2 dtypes and 0 shapes.",
        ),
        ({"dtypes": ["bfloat16", "float32"]}, "a flattened bucket lists its tensors from the widest dtype to the narrowest."),
    ],
)
def test_a_broadcast_of_another_form_is_refused(changes, said, engine):
    routes = routes_of(engine)
    routes._groups["weight_update_group"] = Group()
    with pytest.raises(weight_routes.WeightSyncError) as refused:
        asyncio.run(routes.update_from_distributed(weight_routes.BroadcastBody(**broadcast(**changes))))
    assert str(refused.value) == said


def test_a_group_is_joined_as_it_is_asked_in_place_of_an_older_one_and_few_at_once(engine, monkeypatch):
    made = []

    def join(store: object, **words: object) -> Group:
        made.append((store, words))
        return Group()

    monkeypatch.setattr(weight_routes, "reach_store", lambda address, port, *, timeout_s: (address, port, timeout_s))
    monkeypatch.setattr(weight_routes, "WeightGroup", join)
    routes = routes_of(engine)
    asked = {"master_address": "h", "master_port": 4, "rank_offset": 1, "world_size": 3, "backend": "gloo", "timeout_s": 9.0}
    routes._groups["g"] = older = Group()
    joined = asyncio.run(routes.init_group(weight_routes.GroupBody(**asked, group_name="g")))
    assert orjson.loads(joined.body) == {"success": True, "message": "joined weight group 'g'"}
    words = {"name": "g", "rank": 1, "size": 3, "backend": "gloo", "timeout_s": 9.0}
    assert made == [(("h", 4, 9.0), words)] and older.closed and routes._num_joining == 0
    for name in ("b", "c", "d"):
        asyncio.run(routes.init_group(weight_routes.GroupBody(**asked, group_name=name)))
    with pytest.raises(weight_routes.WeightSyncError, match="this engine is in 4 weight groups or waits to join them"):
        asyncio.run(routes.init_group(weight_routes.GroupBody(**asked, group_name="e")))
    defaults = weight_routes.GroupBody(master_address="h", master_port=4, rank_offset=1, world_size=3)
    assert (defaults.group_name, defaults.backend, defaults.timeout_s) == ("weight_update_group", "nccl", 600.0)


def test_bodies_have_room_for_the_largest_tensor_and_for_prompts(engine):
    limits = EngineServer(engine, model_path="/a", token=None, adapters={}).app().user_middleware[0].kwargs
    assert limits["default_limit"] == 2**20 and limits["loopback_only"] is True
    assert limits["body_limits"] == {"/update_weights_from_tensor": 2 * server.DEFAULT_BUCKET_BYTES + 2**20}
    engine.architecture = SimpleNamespace(vocab_size=10**6, hidden_size=10**4, num_layers=1, max_positions=10**6)
    made = EngineServer(engine, model_path="/a", token=None, adapters={}, loopback_only=False).app()
    limits = made.user_middleware[0].kwargs
    assert limits["default_limit"] == 64 * 12 * 10**6 and limits["loopback_only"] is False
    assert limits["body_limits"] == {"/update_weights_from_tensor": 4 * 10**10 + 2**20}
