"""What a reward worker and the pool say to each other: a 4-byte big-endian length and that many bytes of JSON.

worker: {"ready": true}
pool:   {"pairs": [[answer, label], ...], "deadline_s": 5.0}
worker: {"reason": "sympy_equal"} or {"error": "why the grader failed"}
"""

from __future__ import annotations

import json
import struct

from qwench.samples import Json

HEADER = struct.Struct(">I")


def encode(message: Json) -> bytes:
    """Return a message as it travels."""
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> Json:
    """Return the message of a body."""
    return json.loads(body)
