"""What the client sends to a server, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load

from qwench.engines import client
from qwench.engines.client import HttpEngine
from qwench.engines.embedded.http.api import GenerateBody
from qwench.engines.protocol import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    MemoryTag,
    SamplingParams,
    Scores,
    Scoring,
    WeightReceipt,
)
from qwench.errors import EngineError, EngineLostError, WeightSyncError
from tests.deadlines import patient

META = {
    "finish_reason": {"type": "stop", "matched": 9},
    "output_token_logprobs": [[-0.5, 7, None], [-0.25, 9, None]],
    "cached_tokens": 3,
    "weight_versions": [4, 5],
}


class Server:
    """Answers each path as the table says, with status 200 unless it names another, and keeps the requests."""

    def __init__(self, answers: dict[str, object]) -> None:
        self.requests: list[tuple[str, str, bytes]] = []
        self.headers: list[dict[str, str]] = []
        self.asked = threading.Event()
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.requests.append((self.command, self.path, body))
                outer.headers.append(dict(self.headers))
                answer = answers.get(self.path.partition("?")[0], {})
                outer.asked.set()
                if answer == "hang":
                    outer.release.wait(patient(20))
                status, content = answer if isinstance(answer, tuple) else (200, answer)
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def bodies(self) -> list[tuple[str, object]]:
        return [(path, json.loads(body) if body else None) for _, path, body in self.requests]

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(**answers: object) -> Server:
        servers.append(Server({f"/{name}": answer for name, answer in answers.items()}))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def use(url: str, work, **options):
    """Return what `work(engine)` returns."""

    async def scenario():
        engine = HttpEngine(url, **options)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(scenario())


def request(**sampling) -> GenerateRequest:
    return GenerateRequest(request_id="r", input_ids=[1, 2], sampling=SamplingParams(max_new_tokens=5, **sampling))


def test_a_request_is_sent_and_its_answer_read_in_sglangs_form(serve):
    server = serve(generate={"text": "hi", "meta_info": META})
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "min_new_tokens": 1, "stop": ("x", "y")}
    more = {"stop_token_ids": (8,), "ignore_eos": True, "skip_special_tokens": True, "seed": 11}
    result = use(server.url, lambda engine: engine.generate(request(**sampling, **more)), token="secret")
    assert result == GenerateResult(
        request_id="r",
        output_ids=[7, 9],
        log_probs=[-0.5, -0.25],
        finish_reason=FinishReason.STOP,
        matched=9,
        weight_versions=[4, 5],
        text="hi",
        cached_tokens=3,
    )
    [(path, body)] = server.bodies()
    wire = {**sampling, **more, "stop": ["x", "y"], "stop_token_ids": [8], "sampling_seed": 11, "max_new_tokens": 5}
    del wire["seed"]
    assert path == "/generate" and body["sampling_params"] == {
        **wire,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    assert (body["rid"], body["input_ids"], body["return_logprob"]) == ("r$", [1, 2], True)
    assert "priority" not in body
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.headers[0]["Content-Type"] == "application/json"


def test_an_adapter_and_the_kept_tokens_are_asked_for_and_read(serve):
    server = serve(generate={"text": "hi", "meta_info": {**META, "output_support": [[7, 8], [9]]}})
    asked = replace(request(keeps_support=True), adapter="mine")
    assert use(server.url, lambda engine: engine.generate(asked)).support == [[7, 8], [9]]
    [(_, body)] = server.bodies()
    assert (body["lora_path"], body["sampling_params"]["keeps_support"]) == ("mine", True)
    use(server.url, lambda engine: engine.generate(request()))
    assert "lora_path" not in server.bodies()[1][1] and "keeps_support" not in server.bodies()[1][1]["sampling_params"]


def test_a_priority_arrives_as_it_was_given(serve):
    server = serve(generate={"text": "hi", "meta_info": META})
    use(server.url, lambda engine: engine.generate(replace(request(), priority=-1)))
    [(_, body)] = server.bodies()
    (received,) = GenerateBody.model_validate(body).to_requests(None, max_tokens=10)
    assert body["priority"] == -1 and received.priority == -1 and received.yields


def test_without_versions_of_tokens_all_have_the_servers_and_without_a_seed_none_is_sent(serve):
    meta = {**META, "weight_version": "6", "finish_reason": {"type": "length"}, "cached_tokens": 0}
    del meta["weight_versions"]
    server = serve(generate={"text": None, "meta_info": meta})
    result = use(server.url, lambda engine: engine.generate(request()))
    assert (result.weight_versions, result.matched, result.text) == ([6, 6], None, "")
    assert result.finish_reason is FinishReason.LENGTH
    assert "sampling_seed" not in server.bodies()[0][1]["sampling_params"] and "Authorization" not in server.headers[0]


def test_a_response_of_no_tokens_is_read(serve):
    server = serve(generate={"meta_info": {**META, "output_token_logprobs": None, "weight_versions": []}})
    result = use(server.url, lambda engine: engine.generate(request()))
    assert (result.output_ids, result.log_probs, result.weight_versions) == ([], [], [])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"meta_info": {}}, "answered /generate with something else than SGLang does: KeyError"),
        ([], "answered /generate with something else than SGLang does: TypeError"),
        ({"meta_info": {**META, "finish_reason": {"type": "tired"}}}, "something else than SGLang does: ValueError"),
        ({"meta_info": {**META, "weight_versions": None, "weight_version": "default"}}, "'default', not a number"),
        ((200, b"{broken"), "answered /generate with broken JSON"),
        ((400, {"error": {"message": "too long"}}), "with status 400: too long"),
        ((400, {"error": {"detail": "too long"}}), "with status 400: too long"),
        ((400, {"error": "too long"}), "with status 400: too long"),
        ((422, b"too long"), "with status 422: too long"),
        ((400, {"success": False, "error_message": "too long"}), "with status 400: too long"),
        ((400, {"success": False}), "with status 400: {'success': False}"),
        ((400, [1]), r"with status 400: \[1\]"),
    ],
)
def test_an_answer_that_is_no_result_is_an_error_and_no_loss(serve, answer, message):
    with pytest.raises(EngineError, match=message) as raised:
        use(serve(generate=answer).url, lambda engine: engine.generate(request()))
    assert not isinstance(raised.value, EngineLostError)


def test_a_cancelled_caller_aborts_its_request_on_the_server(serve):
    server = serve(generate="hang")

    async def cancelled(engine: HttpEngine) -> None:
        running = asyncio.ensure_future(engine.generate(request()))
        await asyncio.to_thread(server.asked.wait, patient(20))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    use(server.url, cancelled)
    assert server.bodies()[1:] == [("/abort_request", {"rid": "r$", "abort_all": False})]


def test_steering_calls_have_sglangs_paths_and_bodies(serve):
    server = serve(tokenize={"tokens": ["3", 4]})

    async def steer(engine: HttpEngine) -> list[int]:
        await engine.abort("r")
        await engine.abort()
        await engine.pause()
        await engine.pause(retract=True)
        await engine.resume()
        await engine.flush_cache()
        await engine.sleep([MemoryTag.KV_CACHE, MemoryTag.WEIGHTS])
        await engine.wake([MemoryTag.WEIGHTS])
        return await engine.tokenize("a b")

    assert use(server.url + "/", steer) == [3, 4]
    assert server.bodies() == [
        ("/abort_request", {"rid": "r$", "abort_all": False}),
        ("/abort_request", {"rid": "$", "abort_all": True}),
        ("/pause_generation", {"mode": "in_place"}),
        ("/pause_generation", {"mode": "retract"}),
        ("/continue_generation", {}),
        ("/flush_cache", {}),
        ("/flush_cache?timeout=30", {}),
        ("/release_memory_occupation", {"tags": [MemoryTag.KV_CACHE.value, MemoryTag.WEIGHTS.value]}),
        ("/resume_memory_occupation", {"tags": [MemoryTag.WEIGHTS.value]}),
        ("/tokenize", {"prompt": "a b", "add_special_tokens": False}),
    ]


def test_what_a_server_says_of_itself_is_read(serve):
    info = {"model_path": "m", "weight_version": "12"}
    server = serve(model_info=info, server_info={"stats": {"num_running": 2, "strange": 1}})

    async def ask(engine: HttpEngine):
        return await engine.weight_version(), await engine.model_info(), await engine.stats(), await engine.health()

    assert use(server.url, ask) == (12, info, EngineStats(num_running=2), True)
    assert [method for method, _, _ in server.requests] == ["GET"] * 4
    other = serve(model_info={"model_path": "m"}, server_info=[1], health=(503, {}))

    async def ask_other(engine: HttpEngine):
        with pytest.raises(EngineError, match="answered /model_info with something else"):
            await engine.model_info()
        return await engine.server_info(), await engine.health()

    assert use(other.url, ask_other) == ({}, False)
    assert use(serve(server_info={}).url, lambda engine: engine.stats()) == EngineStats()


def test_weights_go_bucket_by_bucket_and_the_last_says_so(serve):
    server = serve(update_weights_from_tensor={"weight_version": "3", "checksums": {"a": 1}})
    whole = torch.arange(6.0)
    buckets = [[("a", whole[:2]), ("b", whole[2:])], [("c", torch.ones(2, dtype=torch.bfloat16))]]
    assert use(server.url, lambda engine: engine.update_weights(iter(buckets), version=3)) == WeightReceipt(
        version=3, checksums={"a": 1}
    )
    paths = [path for _, path, _ in server.requests]
    assert paths == [
        "/update_weights_from_tensor?weight_version=3&index=0&final=false",
        "/update_weights_from_tensor?weight_version=3&index=1&final=true",
    ]
    for (_, _, body), bucket in zip(server.requests, buckets, strict=True):
        sent = load(body)
        assert sent.keys() == dict(bucket).keys() and all(torch.equal(sent[name], tensor) for name, tensor in bucket)
    with pytest.raises(WeightSyncError, match=r"weight version 3 for .* has no buckets at all"):
        use(server.url, lambda engine: engine.update_weights([], version=3))


def test_refused_weights_are_told_from_a_refused_request(serve):
    refusal = (400, {"success": False, "message": "another shape"})
    server = serve(update_weights_from_tensor=refusal, flush_cache=refusal)
    with pytest.raises(WeightSyncError, match="refused the weights: another shape"):
        use(server.url, lambda engine: engine.update_weights([[("a", torch.ones(1))]], version=1))
    with pytest.raises(EngineError, match="with status 400"):
        use(server.url, lambda engine: engine.flush_cache())


def test_a_server_that_is_silent_is_lost(serve):
    with pytest.raises(EngineLostError, match=r"did not answer /generate within 0\.2 s"):
        use(serve(generate="hang").url, lambda engine: engine.generate(request()), generate_timeout_s=0.2)


def test_a_server_that_does_not_listen_is_asked_a_few_times_and_its_health_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    pauses: list[float] = []
    turn = asyncio.sleep

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await turn(0)

    monkeypatch.setattr(client.asyncio, "sleep", note)

    async def ask(engine: HttpEngine) -> bool:
        with pytest.raises(EngineLostError, match=r"cannot be reached for /flush_cache \(4 attempts\)"):
            await engine.flush_cache()
        assert [pause for pause in pauses if pause >= 0.25] == [0.25, 0.5, 1.0]
        pauses.clear()
        return await engine.health()

    assert use(url, ask) is False
    assert [pause for pause in pauses if pause >= 0.25] == []


def test_a_restart_changes_the_address():
    async def scenario() -> list[int]:
        engine = HttpEngine("http://a:1/")
        starts = [engine.address.start]
        engine.note_restart()
        engine.note_restart()
        assert engine.base_url == engine.address.base_url == "http://a:1"
        return [*starts, engine.address.start]

    assert asyncio.run(scenario()) == [0, 2]


SCORED = {
    "finish_reason": {"type": "length", "length": 0},
    "output_token_logprobs": [],
    "weight_version": "default",
    "input_token_logprobs": [[None, 5, None], [-0.5, 6, None], [-1.5, 0, None]],
    "input_top_logprobs": [None, [[-0.5, 6, None], [-0.75, 4, None]], [[-0.25, 2, None], [-1.0, 8, None]]],
    "input_token_ids_logprobs": [None, [[-3.0, 8, None], [-4.0, 2, None]], [[-1.0, 8, None], [-0.25, 2, None]]],
}


def scored(meta: dict[str, object], scoring: Scoring) -> tuple[GenerateResult, object]:
    server = Server({"/generate": {"text": "", "meta_info": meta}})
    sampling = SamplingParams(max_new_tokens=0, temperature=0.0)
    request = GenerateRequest(request_id="r", input_ids=[4, 5, 6, 7], sampling=sampling, scoring=scoring)

    async def ask() -> GenerateResult:
        engine = HttpEngine(server.url)
        try:
            return await engine.generate(request)
        finally:
            await engine.close()

    try:
        return asyncio.run(ask()), server.bodies()[0][1]
    finally:
        server.close()


def test_scores_of_a_prompt_are_read_as_sglang_sends_them():
    """The last token of a vocabulary comes back as 0, and log-probs of named tokens in any order."""
    result, body = scored(SCORED, Scoring(start=2, top_k=2, token_ids=(2, 8)))
    expected = Scores(
        log_probs=[-0.5, -1.5],
        top=[[(-0.5, 6), (-0.75, 4)], [(-0.25, 2), (-1.0, 8)]],
        of_token_ids=[[-4.0, -3.0], [-0.25, -1.0]],
    )
    assert (result.scores, list(result.weight_versions)) == (expected, [])
    sent = {"logprob_start_len": 1, "top_logprobs_num": 2, "token_ids_logprob": [2, 8], "return_logprob": True}
    assert body["sampling_params"]["max_new_tokens"] == 0
    assert {name: body[name] for name in sent} == sent


@pytest.mark.parametrize("entries", [[[None, 5, None], [-0.5, 6, None]], [[None, 5, None], [-0.5, 7, None], [-1.5, 7, None]]])
def test_scores_of_other_tokens_are_refused(entries):
    with pytest.raises(EngineError, match=r"input_token_logprobs has [12] tokens"):
        scored({**SCORED, "input_token_logprobs": entries}, Scoring(start=2))


@pytest.mark.parametrize(
    ("name", "asked"), [("input_top_logprobs", {"top_k": 2}), ("input_token_ids_logprobs", {"token_ids": (2, 8)})]
)
def test_a_list_of_scores_of_another_length_is_refused(name, asked):
    with pytest.raises(EngineError, match=r"2 tokens have [01] input_top_logprobs, [01] input_token_ids_logprobs"):
        scored({**SCORED, name: SCORED[name][:2]}, Scoring(start=2, **asked))


@pytest.mark.parametrize("entries", [[[None, 5, None], [-0.5, 6, None]], None])
def test_an_aborted_request_has_no_scores(entries):
    aborted = {"finish_reason": {"type": "abort", "message": "aborted"}, "input_token_logprobs": entries}
    result, _ = scored({**SCORED, **aborted}, Scoring(start=2, top_k=2))
    assert (result.finish_reason, result.scores) == (FinishReason.ABORT, None)
