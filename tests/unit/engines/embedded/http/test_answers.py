"""What the engine's server says of requests that it refuses."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from starlette.exceptions import HTTPException

from qwench.engines.embedded.http.answers import FieldError, answer_field_error, answer_status, error_record, json_bytes
from tests.unit.engines.embedded.http.test_server import NotingEngine, ask

HEADER = "the body must be JSON, with the header Content-Type: application/json."
STRING = "Input should be a valid string"


@pytest.mark.parametrize(
    ("path", "kind", "raw", "message", "field"),
    [
        ("/pause_generation", b"text/plain", b"{}", HEADER, None),
        ("/pause_generation", b"application/json", b"{nope", "the body is no JSON: character 1: Expecting property name", None),
        ("/pause_generation", b"application/json", b"[]", ": Input should be a valid dictionary", None),
        ("/pause_generation", b"application/json", b'{"mode": 3}', f"mode: {STRING}", "mode"),
        (
            "/load_lora_adapter",
            b"application/json",
            b'{"lora_name": 1, "lora_path": 2}',
            f"lora_name: {STRING}; lora_path: {STRING}",
            "lora_name",
        ),
        (
            "/generate",
            b"application/json",
            b'{"input_ids": [5], "stop": 1}',
            "stop: this path has no such field",
            "stop",
        ),
    ],
)
def test_a_body_that_its_path_does_not_take_is_refused_by_its_fields(path, kind, raw, message, field):
    engine = NotingEngine()
    status, answer = ask(engine, path, raw=raw, kind=kind)
    error = answer["error"]
    assert (status, error["type"], error["code"], error["param"]) == (400, "invalid_request_error", None, field)
    assert error["message"].startswith(message) and engine.noted == []


def test_a_path_or_a_method_that_is_none_is_answered_in_the_same_form():
    for path, method, status, said in (("/none", "POST", 404, "Not Found"), ("/generate", "GET", 405, "Method Not Allowed")):
        error = {"message": said, "type": "invalid_request_error", "param": None, "code": None}
        assert ask(NotingEngine(), path, method=method) == (status, {"error": error})
    answer = asyncio.run(answer_status(None, HTTPException(401, "who?", headers={"WWW-Authenticate": "Bearer"})))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.headers["content-type"] == "application/json"


def test_a_field_is_named_with_its_status_and_code():
    answer = asyncio.run(answer_field_error(None, FieldError("n", "too many", status_code=413, code="large")))
    error = {"message": "too many", "type": "invalid_request_error", "param": "n", "code": "large"}
    assert (answer.status_code, orjson.loads(answer.body)) == (413, {"error": error})
    assert FieldError("n", "too many").status_code == 400


def test_errors_of_the_server_and_those_of_a_request_differ_in_their_type():
    types = [error_record(status, "x")["error"]["type"] for status in (499, 500)]
    assert types == ["invalid_request_error", "server_error"]


def test_numbers_that_json_cannot_spell_are_null_and_half_a_character_goes_back_as_it_came():
    assert json_bytes({"a": float("nan")}) == b'{"a":null}'
    assert json_bytes([{"a": "\ud83d"}]) == b'[{"a": "\\ud83d"}]'
