"""The embedded engine's HTTP API, as any client of SGLang sees it, and how the client fails."""

from __future__ import annotations

import asyncio
import json
import pickle
import shlex
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, wait
from urllib.parse import urlencode

import pytest
import torch
from safetensors.torch import save, save_file

from qwench.engines.client import HttpEngine
from qwench.engines.embedded.http.api import GenerateBody
from qwench.engines.embedded.http.serving import ServerThread, greeting, serve
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.errors import EngineError
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.checksums import tensor_checksum
from tests.contract.engine_hosts import ask, make_engine, make_model, prompt_of
from tests.deadlines import patient

TOKEN = "secret"


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3")


@pytest.fixture(scope="module")
def server(model):
    with ServerThread(make_engine(model, tokenizer=build_small_tokenizer()), model_path="tiny", token=TOKEN) as server:
        yield server


def call(server, path, body=None, *, method="POST", token=None, content_type="application/json"):
    """Return status and decoded answer."""
    raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": content_type} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(server.base_url + path, data=raw, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=patient(20)) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    return status, json.loads(content) if content[:1] in (b"{", b"[") else content.decode()


def test_generate_from_ids_answers_in_sglangs_form(server):
    body = {
        "input_ids": prompt_of(7),
        "rid": "mine",
        "sampling_params": {"max_new_tokens": 5, "ignore_eos": True, "sampling_seed": 3},
        "return_logprob": True,
    }
    status, answer = call(server, "/generate", body)
    assert status == 200
    meta = answer["meta_info"]
    assert meta["id"] == "mine" and meta["prompt_tokens"] == 7 and meta["completion_tokens"] == 5
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert meta["weight_version"] == "0"
    assert [token for _, token, _ in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(log_prob < 0 and text is None for log_prob, _, text in meta["output_token_logprobs"])


def test_text_is_tokenised_and_a_list_answered_by_a_list(server):
    params = {"max_new_tokens": 3, "ignore_eos": True, "temperature": 0.0, "skip_special_tokens": False}
    tokenizer = build_small_tokenizer()
    _, texts = call(server, "/generate", {"text": ["12 + 5", "x"], "sampling_params": params})
    _, ids = call(
        server, "/generate", {"input_ids": tokenizer(["12 + 5", "x"])["input_ids"], "sampling_params": [params, params]}
    )
    assert [answer["output_ids"] for answer in texts] == [answer["output_ids"] for answer in ids]
    assert texts[0]["text"] == tokenizer.decode(texts[0]["output_ids"])


def test_text_is_trimmed_of_what_stopped_it_unless_asked_otherwise(server):
    params = {"max_new_tokens": 20, "sampling_seed": 11, "skip_special_tokens": False}
    _, free = call(server, "/generate", {"input_ids": prompt_of(7), "sampling_params": params | {"ignore_eos": True}})
    stop = free["output_ids"][6]
    end = free["output_ids"].index(stop) + 1
    decode = build_small_tokenizer().decode
    for keep, expected in ((True, free["output_ids"][:end]), (False, free["output_ids"][: end - 1])):
        body = {"input_ids": prompt_of(7), "sampling_params": params | {"stop_token_ids": [stop], "no_stop_trim": keep}}
        _, answer = call(server, "/generate", body)
        assert answer["output_ids"] == free["output_ids"][:end]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert answer["text"] == decode(expected)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"background": True}, "background"),
        ({"sampling_params": {"n": 2}}, "n must be 1"),
        ({"sampling_params": {"frequency_penalty": 0.5}}, "frequency_penalty"),
        ({"sampling_params": {"regex": "a+"}}, "regex"),
        ({"sampling_params": {"top_p": 0.0}}, "top_p"),
        ({"text": "and ids"}, "either text or input_ids"),
        ({"rid": ["a", "b"]}, "rid"),
        ({"image_data": "x"}, "image_data"),
        ({"logprob_start_len": 0}, "max_new_tokens: 0"),
        ({"top_logprobs_num": 2}, "max_new_tokens: 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, change, word):
    status, answer = call(server, "/generate", {"input_ids": [5, 6, 7]} | change)
    assert status == 400
    assert word in answer["error"]["message"]


def test_information_endpoints(server):
    for path in ("/health", "/health_generate"):
        assert call(server, path, method="GET")[0] == 200
    for path in ("/get_model_info", "/model_info"):
        assert call(server, path, method="GET")[1]["model_path"] == "tiny"
    for path in ("/get_server_info", "/server_info"):
        assert call(server, path, method="GET")[1]["stats"]["num_pages"] == 1024
    assert call(server, "/flush_cache", token=TOKEN)[0] == 200
    for nothing in ({}, {"rid": ""}):
        assert call(server, "/abort_request", nothing, token=TOKEN)[0] == 400
    assert call(server, "/pause_generation", {"mode": "sleep"}, token=TOKEN)[0] == 400
    status, answer = call(server, "/release_memory_occupation", {"tags": ["kv_cache", "disk"]}, token=TOKEN)
    assert (status, answer["error"]["message"]) == (400, "unknown tags ['disk']; known: kv_cache, weights.")


def test_an_abort_ends_every_request_whose_id_begins_so_and_no_other(server):
    def body(rid):
        return {"input_ids": [5, 6, 7], "rid": rid, "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}

    assert call(server, "/pause_generation", {"mode": "in_place"}, token=TOKEN)[0] == 200
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(call, server, "/generate", body(rid)) for rid in ("job-1-a", "job-1-b", "job-2", "a-job-1")]
        while call(server, "/server_info", method="GET")[1]["stats"]["num_waiting"] < len(asked):
            assert not wait(asked, timeout=0.05).done
        assert call(server, "/abort_request", {"rid": "job-1"}, token=TOKEN)[0] == 200
        assert call(server, "/continue_generation", token=TOKEN)[0] == 200
        ends = [one.result()[1]["meta_info"]["finish_reason"]["type"] for one in asked]
    assert ends == ["abort", "abort", "length", "length"]


def test_a_pause_without_a_mode_ends_what_runs(server):
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
    assert call(server, "/pause_generation", {"mode": "in_place"}, token=TOKEN)[0] == 200
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(call, server, "/generate", body)
        while call(server, "/server_info", method="GET")[1]["stats"]["num_waiting"] < 1:
            assert not wait([asked], timeout=0.05).done
        assert call(server, "/pause_generation", {}, token=TOKEN) == (200, {"status": "ok", "message": "generation is paused"})
        assert asked.result()[1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert call(server, "/continue_generation", token=TOKEN) == (200, {"status": "ok", "message": "generation goes on"})


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_server_answers_only_when_it_goes_on(server, mode):
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
    assert call(server, "/pause_generation", {"mode": mode}, token=TOKEN)[0] == 200
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(call, server, "/generate", body)
        assert not wait([asked], timeout=0.5).done
        assert call(server, "/continue_generation", token=TOKEN)[0] == 200
        assert asked.result()[1]["meta_info"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "path",
    [
        *("/update_weights_from_tensor", "/update_weights_from_disk", "/release_memory_occupation"),
        *("/resume_memory_occupation", "/abort_request", "/pause_generation", "/continue_generation", "/flush_cache"),
    ],
)
def test_what_changes_weights_memory_or_others_requests_needs_the_token(server, path):
    assert call(server, path, {"model_path": "x"})[0] == 401
    assert call(server, path, {"model_path": "x"}, token="guess")[0] == 401


def test_pickled_weights_are_refused(server):
    pickled = pickle.dumps({"model.norm.weight": [1.0]})
    path = "/update_weights_from_tensor?weight_version=1"
    assert call(server, path, {"serialized_named_tensors": ["..."]}, token=TOKEN)[0] == 415
    assert call(server, path, pickled, token=TOKEN, content_type="application/octet-stream")[0] == 400


def test_weights_come_in_buckets_or_from_disk(model, tmp_path):
    other = make_model("qwen3", seed=6)
    named = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    names = sorted(named)
    save_file(named, tmp_path / "model.safetensors")
    with ServerThread(make_engine(model)) as server:
        for index, (part, final) in enumerate(((names[:4], "false"), (names[4:], "true"))):
            query = urlencode({"weight_version": 4, "index": index, "final": final})
            body = save({name: named[name] for name in part})
            status, answer = call(server, f"/update_weights_from_tensor?{query}", body, content_type="application/octet-stream")
            assert status == 200
        assert answer["checksums"] == {name: tensor_checksum(tensor) for name, tensor in named.items()}
        assert call(server, "/get_weight_version", method="GET")[1] == {"weight_version": "4"}
        status, answer = call(server, "/update_weights_from_disk", {"model_path": str(tmp_path)})
        assert (status, answer.get("weight_version")) == (200, 5), answer
        assert call(server, "/update_weights_from_disk", {"model_path": str(tmp_path / "none")})[0] == 400


def test_client_names_the_server_it_cannot_reach():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def scenario():
        engine = HttpEngine(f"http://127.0.0.1:{port}")
        healthy = await engine.health()
        with pytest.raises(EngineError, match=rf"{port}\) cannot be reached for /generate \(4 attempts\)"):
            await engine.generate(ask("r", [5]))
        await engine.close()
        return healthy

    assert asyncio.run(scenario()) is False


def test_client_gives_up_at_its_deadline():
    async def scenario():
        with socket.create_server(("127.0.0.1", 0)) as silent:
            engine = HttpEngine(f"http://127.0.0.1:{silent.getsockname()[1]}", generate_timeout_s=0.1)
            with pytest.raises(EngineError, match=r"did not answer /generate within 0\.1 s"):
                await engine.generate(ask("r", [5]))
            await engine.close()

    asyncio.run(scenario())


def test_cancelled_caller_aborts_its_request_on_the_server(model):
    async def scenario(engine):
        running = asyncio.ensure_future(engine.generate(ask("r", prompt_of(5), max_new_tokens=1000, ignore_eos=True)))
        while (await engine.stats()).generated_tokens < 2:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        stats = await engine.stats()
        await engine.close()
        return stats

    with ServerThread(make_engine(model)) as server:
        stats = asyncio.run(scenario(HttpEngine(server.base_url)))
    assert stats.num_running == 0 and stats.generated_tokens < 1000


def test_open_port_without_a_token_is_refused(tmp_path):
    with pytest.raises(EngineError, match="set a token"):
        serve(tmp_path, EmbeddedSettings(), host="0.0.0.0")


def test_the_first_message_of_a_server_is_a_request_that_can_be_pasted(tmp_path):
    said = greeting("tiny", {"law": tmp_path}, host="127.0.0.1", port=8000)
    assert said.startswith("serving tiny with adapters law; OpenAI's clients: http://127.0.0.1:8000/v1; ask: curl -s ")
    words = shlex.split(said.partition("ask: ")[2])
    assert words[3:5] == ["-H", "Content-Type: application/json"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["lora_path"] == "law" and GenerateBody.model_validate(body).sampling_params.max_new_tokens == 32
    assert "lora_path" not in greeting("tiny", {}, host="127.0.0.1", port=8000)
    assert "http://[::1]:8000/v1; ask: curl -s 'http://[::1]:8000/generate'" in greeting("tiny", {}, host="::1", port=8000)


def test_a_body_that_is_not_sent_as_json_is_refused_with_the_header_to_send(model, server):
    status, answer = call(server, "/generate", b'{"text": "a"}', content_type="application/x-www-form-urlencoded")
    assert status == 400
    assert answer["error"]["message"] == "the body must be JSON, with the header Content-Type: application/json."


def test_weights_of_another_shape_are_refused_by_the_server(model, server):
    body = save({"model.norm.weight": torch.zeros(33)})
    path = "/update_weights_from_tensor?weight_version=9"
    status, answer = call(server, path, body, token=TOKEN, content_type="application/octet-stream")
    assert status == 400 and answer["success"] is False and "has shape" in answer["message"]
