"""What the engine's server refuses at its border, and that it serves on afterwards."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest

from qwench.engines.client import IDLE_TIMEOUT_S
from qwench.engines.embedded.http import border
from qwench.engines.embedded.http.serving import ServerThread
from qwench.engines.embedded.http.weight_routes import MAX_GROUPS
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.wire.portions import DEFAULT_BUCKET_BYTES
from tests.contract.engine_hosts import make_engine, make_model
from tests.deadlines import patient

TOKEN = "gehe\u00edm \u4e16\u754c"


@pytest.fixture(scope="module")
def server():
    engine = make_engine(make_model("qwen3"), tokenizer=build_small_tokenizer())
    with ServerThread(engine, model_path="tiny", token=TOKEN) as server:
        yield server


def connect(server) -> http.client.HTTPConnection:
    host, port = server.base_url.removeprefix("http://").split(":")
    return http.client.HTTPConnection(host, int(port), timeout=patient(30))


def ask(server, path, body=None, *, method="POST", headers=None) -> tuple[int, str]:
    connection = connect(server)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def generate(server, **body) -> tuple[int, str]:
    return ask(server, "/generate", json.dumps({"input_ids": [5, 6], **body}))


def bearer(token: str) -> dict[str, bytes]:
    return {"Authorization": f"Bearer {token}".encode()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 10**30),
        ("top_k", 2**31),
        ("top_k", -2),
        ("temperature", 1e-45),
        ("temperature", 1e300),
        ("temperature", -0.5),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_new_tokens", -1),
        ("min_new_tokens", 100),
        ("max_new_tokens", 0),
        ("max_new_tokens", -(10**30)),
        ("stop_token_ids", [288]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [10**30]),
        ("stop_token_ids", [7] * 300),
        ("stop", ["\ud83d"]),
        ("stop", ["x" * 20_000]),
        ("stop", ["x"] * 300),
        ("stop", [""]),
        ("n", 2),
        ("repetition_penalty", 1.1),
        ("sampling_seed", 0.5),
        ("top_k", "many"),
        ("unknown", 1),
    ],
)
def test_a_sampling_parameter_out_of_bounds_is_refused_by_name(server, name, value):
    status, answer = generate(server, sampling_params={"max_new_tokens": 3, "stop_token_ids": [9], name: value})
    assert status == 400
    assert name.removeprefix("sampling_").split("_")[0] in answer


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
def test_a_number_that_is_none_is_refused(server, name, value):
    status, answer = ask(server, "/generate", f'{{"input_ids": [5], "sampling_params": {{"{name}": {value}}}}}')
    assert status == 400 and name in answer


@pytest.mark.parametrize(
    "body",
    [
        {"text": [], "input_ids": None},
        {"input_ids": []},
        {"input_ids": [[]]},
        {"input_ids": [288]},
        {"input_ids": [True]},
        {"input_ids": [[5, True]]},
        {"input_ids": [10**30]},
        {"input_ids": [[5]] * 4097},
        {"input_ids": None, "text": "\ud83d"},
        {"input_ids": None, "text": "a" * 200_000},
        {"rid": "x" * 300},
        {"rid": "a\nb"},
        {"rid": ""},
    ],
)
def test_a_prompt_or_id_that_is_none_is_refused(server, body):
    assert generate(server, **body)[0] == 400


def test_bounds_themselves_are_answered(server):
    for sampling in (
        {"top_k": 2**31 - 1, "temperature": 1e6},
        {"top_k": 0, "temperature": 1e-6},
        {"min_new_tokens": 2, "max_new_tokens": 2, "stop_token_ids": [287]},
        {"sampling_seed": -(10**30), "max_new_tokens": 10**30, "stop": ["x"], "min_p": 1, "top_p": 1e-300},
    ):
        status, answer = generate(server, sampling_params={"max_new_tokens": 2, **sampling}, return_logprob=True)
        assert status == 200, answer
        assert all(entry[0] <= 0 for entry in json.loads(answer)["meta_info"]["output_token_logprobs"])


WEIGHT_PATHS = [f"/update_weights_from_{source}" for source in ("tensor", "distributed", "disk")]


OPENAI_PATHS = ["/v1/completions", "/v1/chat/completions"]


@pytest.mark.parametrize("path", ["/generate", *OPENAI_PATHS, "/init_weights_update_group", *WEIGHT_PATHS])
def test_a_body_that_says_it_is_too_large_is_not_read(server, path):
    connection = connect(server)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    answer = connection.getresponse()  # though not one byte of the body was sent
    assert (answer.status, "larger than" in answer.read().decode()) == (413, True)
    connection.close()


def test_a_body_may_be_as_large_as_its_model_and_its_path_need():
    model = make_model("qwen3")
    model.config.max_position_embeddings = 4096
    engine = make_engine(model, tokenizer=build_small_tokenizer())
    with ServerThread(engine, model_path="tiny") as server:
        for path, most in (
            ("/generate", 64 * 4096 * 12),  # 64 prompts of all positions, with 12 bytes for a token
            ("/update_weights_from_tensor", 2 * DEFAULT_BUCKET_BYTES + 2**20),  # what a sender packs, the model being small
        ):
            status, answer = ask(server, path, headers={"Content-Length": str(most + 1)})
            assert status == 413 and f"larger than {most} bytes" in answer


@pytest.mark.parametrize("path", ["/generate", *OPENAI_PATHS, "/update_weights_from_disk"])
def test_a_body_that_says_nothing_of_its_size_is_counted_while_it_is_read(server, path):
    def pieces():
        for _ in range(32):
            yield b" " * 2**16

    connection = connect(server)
    headers = {"Content-Type": "application/json", **bearer(TOKEN)}
    connection.request("POST", path, pieces(), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert (answer.status, "larger than" in json.loads(answer.read())["error"]["message"]) == (413, True)
    connection.close()


@pytest.mark.parametrize(
    ("path", "question"),
    [
        ("/generate", {"text": "1+1"}),
        ("/v1/completions", {"prompt": "1+1"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1+1"}]}),
    ],
)
def test_others_are_answered_while_a_text_is_tokenised(path, question):
    begun, go_on, small = threading.Event(), threading.Event(), build_small_tokenizer()

    class Slow:
        def __call__(self, text, **options):
            begun.set()
            assert go_on.wait(patient(60))
            return small(text, **options)

        def __getattr__(self, name):
            return getattr(small, name)

    engine = make_engine(make_model("qwen3"), tokenizer=Slow())
    with ServerThread(engine, model_path="tiny") as server, ThreadPoolExecutor() as pool:
        slow = pool.submit(ask, server, path, json.dumps(question))
        try:
            assert begun.wait(patient(30))
            assert ask(server, "/server_info", method="GET")[0] == 200
            assert generate(server, sampling_params={"max_new_tokens": 1})[0] == 200
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result()[0] == 200


def test_a_connection_without_a_whole_request_is_closed(server, monkeypatch):
    monkeypatch.setattr(border, "HEADER_TIMEOUT_S", 0.2)
    host, port = server.base_url.removeprefix("http://").split(":")
    for begun in (b"", b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "):
        with socket.create_connection((host, int(port)), timeout=patient(30)) as connection:
            connection.sendall(begun)
            assert connection.recv(1) == b""


def test_an_idle_connection_outlives_a_client_that_is_slow_to_read(server):
    connection = connect(server)
    connection.request("GET", "/health")
    connection.getresponse().read()
    (own,) = (one for one in server._server.server_state.connections if one.client == connection.sock.getsockname())
    connection.close()
    assert own.timeout_keep_alive > 10 * IDLE_TIMEOUT_S


def test_a_body_that_stops_coming_is_refused(server, monkeypatch):
    monkeypatch.setattr(border, "BODY_TIMEOUT_S", 0.2)
    connection = connect(server)
    connection.putrequest("POST", "/generate")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"input_ids"')
    assert connection.getresponse().status == 408
    connection.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/release_memory_occupation"), ("POST", "/generate"), ("POST", "/v1/completions")]
)
def test_a_web_page_from_elsewhere_is_refused(server, method, path, headers):
    body = '{"input_ids": [5]}' if method == "POST" else None
    assert ask(server, path, body, method=method, headers={**bearer(TOKEN), **headers})[0] == 403


def test_the_servers_own_pages_and_names_pass(server):
    host = server.base_url.removeprefix("http://")
    for headers in ({"Origin": server.base_url}, {"Host": f"localhost:{host.split(':')[1]}"}, {"Sec-Fetch-Site": "none"}):
        assert ask(server, "/health", method="GET", headers=headers)[0] == 200


def test_any_token_works_and_no_other(server):
    assert ask(server, "/flush_cache", headers=bearer(TOKEN))[0] == 200
    for token in ("", TOKEN[:-1], "geheim"):
        assert ask(server, "/flush_cache", headers=bearer(token))[0] == 401


def test_an_empty_token_is_none():
    with ServerThread(make_engine(make_model("qwen3")), model_path="tiny", token="") as server:
        assert ask(server, "/flush_cache")[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/update_weights_from_disk", {"model_path": "x" * 5000}),
        ("/update_weights_from_disk", {"model_path": "/", "weight_version": "9" * 5000}),
        ("/update_weights_from_disk", {"model_path": "\0"}),
        ("/init_weights_update_group", {"master_address": "x", "master_port": 70_000, "rank_offset": 0, "world_size": 1}),
        ("/init_weights_update_group", {"master_address": "x", "master_port": 80, "rank_offset": 0, "world_size": 10**30}),
        ("/update_weights_from_distributed", {"names": ["a"], "dtypes": [], "shapes": [], "weight_version": "1"}),
        ("/pause_generation", {"mode": "x"}),
        ("/abort_request", {}),
        ("/release_memory_occupation", {"tags": ["x"]}),
    ],
)
def test_a_request_about_weights_that_cannot_be_is_refused(server, path, body):
    assert ask(server, path, json.dumps(body), headers=bearer(TOKEN))[0] == 400


def test_groups_that_wait_for_a_trainer_are_few_and_hold_no_other_request(server):
    def join(number, timeout_s=patient(4)):  # noqa: B008 - a number
        body = {"master_port": port, "rank_offset": 1, "world_size": 2, "group_name": str(number), "timeout_s": timeout_s}
        raw = json.dumps({"master_address": "127.0.0.1", **body})
        return ask(server, "/init_weights_update_group", raw, headers=bearer(TOKEN))

    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(join, number) for number in range(MAX_GROUPS + 2)]
        first = [one.result() for one in itertools.islice(as_completed(asked), 2)]
        assert [(status, f"{MAX_GROUPS} weight groups or waits" in answer) for status, answer in first] == [(400, True)] * 2
        status, _ = generate(server, input_ids=None, text="1+1", sampling_params={"max_new_tokens": 1})
        assert status == 200 and sum(one.done() for one in asked) == 2
    assert sum("no trainer listens" in one.result()[1] for one in asked) == MAX_GROUPS
    assert "no trainer listens" in join("later", timeout_s=0.1)[1], "those that failed wait no more"


def test_the_engine_serves_on(server):
    status, answer = generate(server, sampling_params={"max_new_tokens": 3, "ignore_eos": True})
    assert status == 200 and len(json.loads(answer)["output_ids"]) == 3
    _, info = ask(server, "/server_info", method="GET")
    assert json.loads(info)["stats"]["num_running"] == 0
