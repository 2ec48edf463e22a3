"""Find the answer in a response: the part after the thinking, the last box."""

from __future__ import annotations

import re

THINK_END = "</think>"
RESPONSE_HEADER = "###Response"
_BOX = "\\boxed"
_BRACE = re.compile(r"[{}]")


def after_thinking(response: str) -> str | None:
    """Return the text after the last `</think>`, else the section under `###Response`, else None."""
    if THINK_END in response:
        return response.rpartition(THINK_END)[2]
    if RESPONSE_HEADER in response:
        return response.split(RESPONSE_HEADER)[1]
    return None


def last_box(text: str) -> str | None:
    r"""Return what the last `\\boxed{...}` holds; None if there is none, or the last one has no braces or does not end.

    An earlier box is never used instead: the last one is the answer the model settled on.
    """
    start = text.rfind(_BOX)
    opening = start + len(_BOX)
    if start < 0 or text[opening : opening + 1] != "{":
        return None
    depth = 0
    for brace in _BRACE.finditer(text, opening):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[opening + 1 : brace.start()]
    return None


def bare_label(label: str) -> str | None:
    """Return the answer of a label, which may be boxed. None: the box is broken."""
    return last_box(label) if _BOX in label else label
