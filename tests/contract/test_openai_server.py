"""The engine's server as OpenAI's clients see it, its streams, and its metrics."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator

import pytest

from qwench.engines.embedded.http.serving import ServerThread
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.contract.engine_hosts import LONG, make_engine, make_model, prompt_of
from tests.deadlines import patient

TOKENIZER = build_small_tokenizer()
QUESTION = [{"role": "user", "content": "3 + 4 = ?"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server():
    with ServerThread(
        make_engine(make_model("qwen3"), tokenizer=TOKENIZER), model_path="models/tiny", token="secret"
    ) as server:
        yield server


def connect(server) -> http.client.HTTPConnection:
    host, port = server.base_url.removeprefix("http://").split(":")
    return http.client.HTTPConnection(host, int(port), timeout=patient(20))


def ask(server, path, body=None):
    """Return status and answer; GET without a body."""
    connection = connect(server)
    try:
        raw = None if body is None else json.dumps(body)
        connection.request("GET" if raw is None else "POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read().decode()
        return response.status, json.loads(content) if content.startswith("{") else content
    finally:
        connection.close()


def answer(server, path, **body):
    status, content = ask(server, path, body)
    assert status == 200, content
    return content


def events(server, path, **body) -> list:
    """Return the records of a stream, which must end as OpenAI's do."""
    connection = connect(server)
    connection.request("POST", path, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    assert response.status == 200, content
    assert response.getheader("content-type").startswith("text/event-stream")
    *records, done, end = content.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(one.removeprefix("data: ")) for one in records]


def generate(server, prompt, **params):
    """Return SGLang's answer to the same question."""
    return answer(server, "/generate", input_ids=prompt, sampling_params=params, return_logprob=True)


def test_a_name_with_half_of_a_surrogate_pair_comes_back(server):
    chat = {"messages": QUESTION, "model": "\ud800", "max_tokens": 2}
    status, got = ask(server, "/v1/chat/completions", chat)
    assert (status, got["model"]) == (200, "\ud800")
    assert events(server, "/v1/chat/completions", **chat)[0]["model"] == "\ud800"
    assert ask(server, "/v1/completions", {"prompt": "a", "\ud800": 1})[0] == 400


def stats(server):
    return ask(server, "/server_info")[1]["stats"]


def test_a_completion_is_what_generate_says(server):
    prompt = "12 + 5 ="
    native = generate(server, TOKENIZER(prompt)["input_ids"], max_new_tokens=9, sampling_seed=4, top_k=50, top_p=0.9)
    sampling = {"max_tokens": 9, "seed": 4, "top_k": 50, "top_p": 0.9}
    got = answer(server, "/v1/completions", model="any", prompt=prompt, **sampling)
    assert got["object"] == "text_completion" and got["model"] == "any" and got["id"].startswith("cmpl-")
    assert abs(got["created"] - time.time()) < 3600
    end = {"finish_reason": "length", "matched_stop": None}
    assert got["choices"] == [{"index": 0, "text": native["text"], "logprobs": None, **end}]
    assert got["usage"] == {
        "prompt_tokens": 8, "completion_tokens": 9, "total_tokens": 17, "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip


def test_defaults_are_openais(server):
    got = answer(server, "/v1/completions", prompt=[5, 6], ignore_eos=True, stop=None, temperature=None, n=None)
    assert got["usage"]["completion_tokens"] == 16
    chat = answer(server, "/v1/chat/completions", messages=QUESTION, ignore_eos=True)
    assert chat["usage"]["total_tokens"] == 1100 and chat["choices"][0]["finish_reason"] == "length"


def test_choices_are_those_of_each_prompt_and_of_seeds_that_follow(server):
    prompts = [prompt_of(5), prompt_of(6, seed=1)]
    got = answer(server, "/v1/completions", prompt=prompts, n=2, seed=7, max_tokens=6, ignore_eos=True)
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2, 3]
    alone = [
        generate(server, prompt, max_new_tokens=6, sampling_seed=seed, ignore_eos=True)["text"]
        for prompt in prompts
        for seed in (7, 8)
    ]
    assert [choice["text"] for choice in got["choices"]] == alone and alone[0] != alone[1]
    assert got["usage"]["prompt_tokens"] == 11 and got["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("stop", ["text", ["text", "never in it"]])
def test_a_stop_string_ends_the_text_and_is_no_part_of_it(server, stop):
    sampling = {"sampling_seed": 5, "ignore_eos": True}
    free = generate(server, prompt_of(7), max_new_tokens=30, **sampling)["text"]
    word = free[10:13]
    given = word if stop == "text" else [word, *stop[1:]]
    body = {"prompt": prompt_of(7), "max_tokens": 30, "seed": 5, "ignore_eos": True, "stop": given}
    (choice,) = answer(server, "/v1/completions", **body)["choices"]
    assert choice["text"] == free[: free.index(word)]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", word)
    *pieces, last = [event["choices"][0] for event in events(server, "/v1/completions", **body)]
    assert "".join(piece["text"] for piece in pieces) + last["text"] == choice["text"]
    assert {piece["finish_reason"] for piece in pieces} == {None} and last["finish_reason"] == "stop"


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_chat_is_rendered_by_the_models_template(server, tools, options):
    ids = TOKENIZER.apply_chat_template(
        QUESTION, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )
    native = generate(server, ids, max_new_tokens=7, temperature=0)
    body = {"messages": QUESTION, "max_completion_tokens": 7, "max_tokens": 3, "temperature": 0}
    got = answer(server, "/v1/chat/completions", tools=tools, chat_template_kwargs=options, **body)
    assert got["object"] == "chat.completion" and got["id"].startswith("chatcmpl-")
    (choice,) = got["choices"]
    assert choice["message"] == {"role": "assistant", "content": native["text"]}
    assert got["usage"]["prompt_tokens"] == len(ids) == native["meta_info"]["prompt_tokens"]


def test_tools_that_may_not_be_called_are_not_shown(server):
    shown, hidden, without = (
        answer(server, "/v1/chat/completions", messages=QUESTION, max_tokens=1, **more)["usage"]["prompt_tokens"]
        for more in ({"tools": [TOOL], "tool_choice": "auto"}, {"tools": [TOOL], "tool_choice": "none"}, {})
    )
    assert shown > hidden == without


def test_a_streamed_chat_begins_with_its_role_and_joins_to_the_whole_answer(server):
    body = {"messages": QUESTION, "max_tokens": 40, "seed": 3, "ignore_eos": True, "n": 2, "logprobs": True}
    whole = answer(server, "/v1/chat/completions", **body)["choices"]
    records = events(server, "/v1/chat/completions", **body)
    assert {record["object"] for record in records} == {"chat.completion.chunk"}
    assert len({record["id"] for record in records}) == 1
    for index in (0, 1):
        pieces = [one for record in records for one in record["choices"] if one["index"] == index]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
        assert ["role" in one["delta"] for one in pieces[1:]] == [False] * (len(pieces) - 1)
        assert "".join(one["delta"]["content"] for one in pieces) == whole[index]["message"]["content"]
        assert [one["finish_reason"] for one in pieces] == [None] * (len(pieces) - 1) + ["length"]
        log_probs = [entry for one in pieces if one["logprobs"] for entry in one["logprobs"]["content"]]
        assert log_probs == whole[index]["logprobs"]["content"] and len(log_probs) == 40


def test_usage_ends_a_stream_that_asks_for_it(server):
    body = {"prompt": [prompt_of(5), prompt_of(4)], "max_tokens": 3, "ignore_eos": True}
    *others, last = events(server, "/v1/completions", stream_options={"include_usage": True}, **body)
    assert last["choices"] == [] and all(record["usage"] is None for record in others)
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (9, 6)
    assert all("usage" not in record for record in events(server, "/v1/completions", **body))


def test_log_probs_are_those_of_the_sampled_tokens(server):
    native = generate(server, prompt_of(5), max_new_tokens=6, sampling_seed=2, ignore_eos=True)
    pairs = native["meta_info"]["output_token_logprobs"]
    sampling = {"max_tokens": 6, "seed": 2, "ignore_eos": True}
    (choice,) = answer(server, "/v1/completions", prompt=prompt_of(5), logprobs=0, **sampling)["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"] == [log_prob for log_prob, _, _ in pairs]
    assert found["tokens"] == [TOKENIZER.decode([token]) for _, token, _ in pairs]
    lengths = [len(text) for text in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:count]) for count in range(6)]


def test_generate_streams_the_response_from_its_beginning_each_time(server):
    prompts, params = [prompt_of(5), prompt_of(6)], {"max_new_tokens": 20, "sampling_seed": 6, "ignore_eos": True}
    whole = [generate(server, prompt, **params) for prompt in prompts]
    records = events(server, "/generate", input_ids=prompts, sampling_params=params, return_logprob=True)
    for index, expected in enumerate(whole):
        mine = [record for record in records if record["index"] == index]
        assert len(mine) > 1
        for record in mine:
            count = len(record["output_ids"])
            assert record["output_ids"] == expected["output_ids"][:count]
            assert record["meta_info"]["completion_tokens"] == len(record["meta_info"]["output_token_logprobs"]) == count
            assert expected["text"].startswith(record["text"])
        assert [one["meta_info"]["finish_reason"] for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["text"] == expected["text"] and mine[-1]["meta_info"]["finish_reason"]["type"] == "length"
    alone = events(server, "/generate", text="1 + 1", sampling_params=params)
    assert "index" not in alone[0] and len(alone[-1]["output_ids"]) == 20


def lines(response) -> Iterator[str]:
    while line := response.readline().decode():
        if line.strip():
            yield line.removeprefix("data: ").strip()


def test_a_client_that_leaves_its_stream_gives_rows_and_pages_back(server):
    connection, before = connect(server), stats(server)["generated_tokens"]
    body = {"prompt": prompt_of(9), "max_tokens": LONG, "ignore_eos": True, "n": 3, "stream": True, "temperature": 1}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    assert next(lines(connection.getresponse())).startswith("{")
    assert stats(server)["num_running"] == 3
    connection.sock.close()
    connection.close()
    deadline = time.monotonic() + patient(20)
    while (now := stats(server))["num_running"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (now["num_running"], now["num_free_pages"]) == (0, now["num_pages"])
    assert now["generated_tokens"] - before < 3 * LONG


def test_an_abort_by_id_ends_a_stream(server):
    connection = connect(server)
    body = {"messages": QUESTION, "max_tokens": LONG, "ignore_eos": True, "rid": "mine", "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    received = lines(connection.getresponse())
    assert json.loads(next(received))["id"] == "mine"
    abort = connect(server)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    abort.request("POST", "/abort_request", json.dumps({"rid": "mine"}), headers)
    assert abort.getresponse().status == 200
    *_, last, done = received
    assert done == "[DONE]" and json.loads(last)["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize(
    ("path", "change", "field"),
    [
        ("completions", {"echo": True}, "echo"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"logprobs": 3}, "logprobs"),
        ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"n": 0}, "n"),
        ("completions", {"n": 129}, "n"),
        ("completions", {"prompt": [[5]] * 33, "n": 128}, "n"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [True]}, "prompt"),
        ("completions", {"prompt": [[5, False]]}, "prompt"),
        ("completions", {"prompt": {}}, "prompt"),
        ("completions", {"logit_bias": {"5": 1}}, "logit_bias"),
        ("completions", {"frequency_penalty": 0.1}, "frequency_penalty"),
        ("completions", {"rid": ""}, "rid"),
        ("completions", {"stream_options": {}}, "stream_options"),
        ("completions", {"top_typical": 1}, "top_typical"),
        ("chat/completions", {"top_logprobs": 2, "logprobs": True}, "top_logprobs"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "human", "content": "x"}]}, "messages"),
        ("chat/completions", {"messages": [*QUESTION, {"role": "assistant", "content": "7"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_in_openais_shape(server, path, change, field):
    body = {"prompt": [5, 6]} if path == "completions" else {"messages": QUESTION}
    status, content = ask(server, f"/v1/{path}", body | change)
    assert status == 400, content
    error = content["error"]
    assert error["type"] == "invalid_request_error" and error["code"] is None
    assert error["param"].split(".")[0] == field and error["message"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 2**31}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"stop": [""]}, "stop string"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"min_tokens": 99}, "min_new_tokens"),
        ({"prompt": [10**6]}, "token ids outside"),
        ({"prompt": [5] * 1100}, "positions"),
        ({"prompt": "\ud83d"}, "surrogate"),
        ({"lora_path": "law"}, "law"),
    ],
)
def test_bounds_of_the_engine_hold_for_whole_answers_and_streams(server, change, word):
    for stream in (False, True):
        status, content = ask(server, "/v1/completions", {"prompt": [5, 6], "max_tokens": 4, "stream": stream} | change)
        assert status == 400 and word in content["error"]["message"]


def test_unknown_fields_and_broken_json_are_named_in_plain_words(server):
    misspelt = ask(server, "/v1/completions", {"prompt": [5, 6], "max_token": 4})[1]["error"]
    assert (misspelt["message"], misspelt["param"]) == ("max_token: this path has no such field", "max_token")
    connection = connect(server)
    connection.request("POST", "/v1/completions", "{nope", {"Content-Type": "application/json"})
    response = connection.getresponse()
    broken = json.loads(response.read())["error"]
    connection.close()
    assert response.status == 400 and broken["param"] is None
    assert broken["message"].startswith("the body is no JSON: character 1: Expecting property name")


def test_a_path_that_is_none_is_answered_in_openais_shape(server):
    status, content = ask(server, "/v1/embeddings")
    assert (status, content["error"]["message"]) == (404, "Not Found")


def test_the_model_is_listed_under_its_name(server):
    listed = answer_of_get(server, "/v1/models")
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert {name: card[name] for name in ("id", "object", "root", "parent", "max_model_len")} == {
        "id": "models/tiny", "object": "model", "root": "models/tiny", "parent": None, "max_model_len": 1100,
    }  # fmt: skip
    assert answer_of_get(server, "/v1/models/models/tiny") == card
    status, content = ask(server, "/v1/models/other")
    assert (status, content["error"]["code"], content["error"]["param"]) == (404, "model_not_found", "model")


def answer_of_get(server, path):
    status, content = ask(server, path)
    assert status == 200, content
    return content


def samples(server) -> dict[str, float]:
    """Return the metrics by name."""
    rows = [line.rsplit(" ", 1) for line in answer_of_get(server, "/metrics").splitlines() if not line.startswith("#")]
    assert {name.partition("{")[2] for name, _ in rows} == {'model_name="models/tiny"}'}
    return {name.partition("{")[0]: float(value) for name, value in rows}


def test_metrics_count_what_was_asked_and_answered(server):
    before = samples(server)
    answer(server, "/v1/completions", prompt=prompt_of(8, seed=9), max_tokens=5, ignore_eos=True)
    after = samples(server)
    grown = {name: after[name] - before[name] for name in after if name.endswith("_total")}
    assert grown["sglang:prompt_tokens_total"] == 8
    assert grown["sglang:generation_tokens_total"] == 5
    assert after["qwench:weight_version"] == after["sglang:num_running_reqs"] == after["sglang:num_queue_reqs"] == 0
    assert after["sglang:token_usage"] == 0


def test_usage_of_the_cache_is_the_share_of_pages(server):
    connection = connect(server)
    body = {"input_ids": prompt_of(400), "sampling_params": {"max_new_tokens": 600, "ignore_eos": True}, "stream": True}
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    assert next(lines(connection.getresponse()))
    now = samples(server)
    assert now["sglang:num_running_reqs"] == 1 and 100 / 1024 <= now["sglang:token_usage"] <= 251 / 1024
    connection.sock.close()
    connection.close()
