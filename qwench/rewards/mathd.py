r"""Normal form of a LaTeX answer in the manner of the MATH data set: two spellings of one answer become one string.

`\dfrac12` and `1/2` -> `\frac{1}{2}`; `x = 34` -> `34`; `34\text{ cm}` -> `34`; `.5` -> `\frac{1}{2}`.

Source: the rules of Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset" (arXiv 2103.03874).
"""

from __future__ import annotations

import re

_ALL_TEXT = re.compile(r"^\\text\{(?P<text>.+?)\}$")
_REWRITES = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_UNIT = "\\text{ "  # `\text{` followed by a space begins a unit
_BARE_SQRT = re.compile(r"\\sqrt([^{])")
_BARE_FRAC = re.compile(r"\\frac([^{])(.)")
_SLASH = re.compile(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))")


def normal_form(answer: str) -> str:
    """Return the normal form of `answer`; an answer that the rules cannot read is returned unchanged."""
    answer = answer.strip()
    if wrapped := _ALL_TEXT.search(answer):
        answer = wrapped.group("text").strip()
    text = answer
    for written, normal in _REWRITES:
        text = text.replace(written, normal)
    if text.count(_UNIT) > 1:
        return answer
    text = text.partition(_UNIT)[0].replace("\\%", "")
    text = _without_left_hand_side(_with_leading_zeros(text))
    text = _BARE_SQRT.sub(r"\\sqrt{\1}", text).replace(" ", "")
    return _with_plain_fractions(text)


def _with_leading_zeros(text: str) -> str:
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    return "0" + text if text.startswith(".") else text


def _without_left_hand_side(text: str) -> str:
    """Drop a short name before the only equals sign: `x=34` answers the same as `34`."""
    name, equals, value = text.partition("=")
    return value if equals and "=" not in value and len(name) <= 2 else text


def _with_plain_fractions(text: str) -> str:
    text = _BARE_FRAC.sub(lambda frac: f"\\frac{{{frac[1]}}}" + ("{" if frac[2] == "{" else f"{{{frac[2]}}}"), text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return _SLASH.sub(r"\\frac{\1}{\2}", text) if _SLASH.fullmatch(text) else text
