"""Messages between a reward worker and the pool: a 4-byte big-endian length and that many bytes.

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
    """Return the bytes of a JSON message. A value that JSON does not know becomes its `repr`."""
    return framed(orjson.dumps(message, default=repr, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS))


def framed(body: bytes) -> bytes:
    """Return a body with its length in front."""
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
