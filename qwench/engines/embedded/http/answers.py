"""JSON answers of the engine's server; errors have OpenAI's shape on every path."""

from __future__ import annotations

import json
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from qwench.errors import EngineError

Json = dict[str, Any]  # a JSON object has no closed type


class FieldError(EngineError):
    """A field of a request is refused."""

    def __init__(self, field: str, message: str, *, status_code: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.field, self.status_code, self.code = field, status_code, code


def json_bytes(content: Json | list[Json]) -> bytes:
    """Return JSON; numbers that JSON cannot spell become null."""
    try:
        return orjson.dumps(content)
    except orjson.JSONEncodeError:  # a name of the client's with half of a surrogate pair, which goes back as it came
        return json.dumps(content).encode()


def json_answer(content: Json | list[Json], status_code: int = 200) -> Response:
    """Return an answer of JSON."""
    return Response(json_bytes(content), status_code=status_code, media_type="application/json")


def error_record(status_code: int, message: str, *, field: str | None = None, code: str | None = None) -> Json:
    """Return OpenAI's record of an error."""
    kind = "invalid_request_error" if status_code < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


async def answer_field_error(_: Request, error: Exception) -> Response:
    """Name the field that is refused."""
    assert isinstance(error, FieldError)
    record = error_record(error.status_code, str(error), field=error.field, code=error.code)
    return json_answer(record, error.status_code)


async def answer_invalid(http: Request, error: Exception) -> Response:
    """Name the fields of a body that is not what its path takes."""
    assert isinstance(error, RequestValidationError)
    if "json" not in http.headers.get("content-type", ""):
        message = "the body must be JSON, with the header Content-Type: application/json."
        return json_answer(error_record(400, message), 400)
    problems = error.errors()
    if problems[0]["type"] == "json_invalid":
        message = f"the body is no JSON: character {problems[0]['loc'][1]}: {problems[0]['ctx']['error']}"
        return json_answer(error_record(400, message), 400)
    named = [(".".join(map(str, problem["loc"][1:])), _in_words(problem)) for problem in problems]
    message = "; ".join(f"{field}: {problem}" for field, problem in named)
    return json_answer(error_record(400, message, field=named[0][0] or None), 400)


def _in_words(problem: Json) -> str:
    return "this path has no such field" if problem["type"] == "extra_forbidden" else str(problem["msg"])


async def answer_status(_: Request, error: Exception) -> Response:
    """Answer what a handler or the routing refused."""
    assert isinstance(error, HTTPException)
    answer = json_answer(error_record(error.status_code, str(error.detail)), error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def answer_weight_error(_: Request, error: Exception) -> Response:
    """Answer a refused publication as SGLang does."""
    return json_answer({"success": False, "message": str(error)}, 400)
