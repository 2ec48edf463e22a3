"""Paths of OpenAI's clients: which models there are, whom a request asks, and what it becomes; the engine answers at once."""

from __future__ import annotations

import asyncio
import re
import time

import orjson
import pytest

from qwench.engines.embedded.scheduling.request import RunningRequest
from qwench.engines.protocol import FinishReason, GenerateRequest
from qwench.models.built_tokenizers import build_small_tokenizer
from tests.unit.engines.embedded.http.test_server import NotingEngine, ask

TOKENIZER = build_small_tokenizer()
MESSAGES = [{"role": "user", "content": "a"}]


class AnsweringEngine(NotingEngine):
    """Answers each request with `1x`, in which x is its stop string."""

    tokenizer = TOKENIZER

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[GenerateRequest] = []
        self.dropped = 0

    def start(self, request: GenerateRequest, *, progress: asyncio.Event) -> RunningRequest:
        self.asked.append(request)
        running = RunningRequest(
            request=request, seed=0, max_new_tokens=8, stop_ids=frozenset(),
            future=asyncio.get_running_loop().create_future(), tokens=[*request.input_ids, *TOKENIZER("1x")["input_ids"]],
            num_prompt=len(request.input_ids),
        )  # fmt: skip
        running.log_probs, running.weight_versions = [-1.0] * running.num_output, [0] * running.num_output
        running.finish_reason, running.matched = FinishReason.STOP, "x"
        running.answer(TOKENIZER)
        progress.set()
        return running

    def drop(self, running: RunningRequest) -> None:
        self.dropped += 1


@pytest.fixture
def engine() -> AnsweringEngine:
    return AnsweringEngine()


def test_the_model_and_its_adapters_are_listed_and_described(engine):
    status, listed = ask(engine, "/v1/models", method="GET", token="secret")
    created = listed["data"][0]["created"]
    assert status == 200 and time.time() - 100 < created <= time.time()
    shared = {"object": "model", "created": created, "owned_by": "qwench", "max_model_len": 64}
    base = {"id": "/models/tiny", "root": "/models/tiny", "parent": None, **shared}
    mine = {"id": "mine", "root": "/lora", "parent": "/models/tiny", **shared}
    assert listed == {"object": "list", "data": [base, mine]}
    for card in (base, mine):
        found = ask(engine, f"/v1/models/{card['id']}", method="GET")[1]
        assert {**found, "created": created} == card
    said = {"message": "there is no model 'other'; known: /models/tiny, mine.", "param": "model", "code": "model_not_found"}
    refused = {"error": {**said, "type": "invalid_request_error"}}
    assert ask(engine, "/v1/models/other", method="GET") == (404, refused)
    assert ask(engine, "/v1/completions", {"prompt": "a", "model": "other"}) == (404, refused)
    assert ask(engine, f"/v1/models/{'x' * 200}", method="GET")[1]["error"]["message"].startswith(
        f"there is no model '{'x' * 100}'; "
    )
    assert (ask(engine, "/v1/models")[0], ask(engine, "/v1/completions", method="GET")[0]) == (405, 405)


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({}, None),
        ({"model": "/models/tiny"}, None),
        ({"model": "tiny"}, None),
        ({"model": "default"}, None),
        ({"model": "mine"}, "mine"),
        ({"model": "any:mine"}, "mine"),
        ({"model": "one:mine"}, "one:mine"),
        ({"model": "mine", "lora_path": "other"}, "other"),
    ],
)
def test_the_name_of_a_model_chooses_an_adapter(fields, adapter, engine):
    engine.adapters.folders = {"mine": "/lora", "one:mine": "/other"}
    assert ask(engine, "/v1/completions", {"prompt": "a", **fields})[0] == 200
    assert [one.adapter for one in engine.asked] == [adapter]


def test_without_adapters_every_name_means_the_model(engine):
    engine.adapters.folders = {}
    assert ask(engine, "/v1/completions", {"prompt": "a", "model": "gpt:other"})[0] == 200
    assert engine.asked[0].adapter is None


@pytest.mark.parametrize(
    ("path", "fields", "prefix", "limit"),
    [("/v1/completions", {"prompt": "a"}, "cmpl", 16), ("/v1/chat/completions", {"messages": MESSAGES}, "chatcmpl", 64)],
)
def test_a_request_is_answered_whole_or_in_a_stream(path, fields, prefix, limit, engine):
    status, answer = ask(engine, path, fields)
    assert status == 200 and re.fullmatch(rf"{prefix}-[0-9a-f]{{32}}", answer["id"])
    (asked,) = engine.asked
    assert (asked.request_id, asked.sampling.max_new_tokens, engine.dropped) == (answer["id"], limit, 1)
    (choice,) = answer["choices"]
    assert choice.get("text", choice.get("message", {}).get("content")) == "1"
    _, kept = ask(engine, path, fields | {"no_stop_trim": True, "rid": "own"})
    assert (kept["id"], orjson.dumps(kept).count(b'"1x"')) == ("own", 1)
    status, told = ask(engine, path, fields | {"stream": True, "rid": "own", "stop": "x"})
    assert status == 200 and told.endswith("data: [DONE]\n\n") and '"own"' in told
    assert ask(engine, path, fields | {"n": 0})[1]["error"]["param"] == "n"
