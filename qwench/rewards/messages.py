"""What a reward worker and the pool say to each other: a 4-byte big-endian length and that many bytes.

algebra worker    -> {"ready": true}   <- {"pairs": [[answer, label], ...], "deadline_s": 5.0}
                  -> {"reason": "sympy_equal"} or {"error": why}
custom worker     <- the function's path and settings   -> {"ready": true}   <- calls   -> {"calls": [a record for each]}

Workers answer in JSON. The pool asks custom workers by pickle, which carries samples as they are; it never unpickles.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

import orjson

from qwench.samples import Json

HEADER = struct.Struct(">I")


def encode(message: Json) -> bytes:
    """Return a JSON message as it travels; what JSON does not know travels as its `repr`."""
    return framed(orjson.dumps(message, default=repr, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS))


def framed(body: bytes) -> bytes:
    """Return a body behind its length."""
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> Json:
    """Return the JSON message of a body."""
    return orjson.loads(body)


def read_body(stream: BinaryIO) -> bytes | None:
    """Return the next body, None at the end of input."""
    header = stream.read(HEADER.size)
    return stream.read(HEADER.unpack(header)[0]) if len(header) == HEADER.size else None


def write_message(stream: BinaryIO, message: Json) -> None:
    """Send a JSON message."""
    stream.write(encode(message))
    stream.flush()
