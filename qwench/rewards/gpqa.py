r"""`--rm-type gpqa`: 1 if the response chooses the right option of a multiple-choice question, else 0.

The grader reads what follows the last `</think>`, or everything. The choice is the letter in the last box. Without a
box it is that of the last statement like `answer is (B)`, else like `option B` or `B is correct`, else the last single capital.
A response without a letter is right if it states the right option's text. The label is a letter, the text of a choice, or a
choice's number from 0 on. A row's metadata may hold

    choices          texts in order, or an object of letter -> text
    valid_letters    instead of A, B, ... as many as there are choices (10 where they are not given)
    correct_letter   wins over the label, which may then be absent

Source: GPQA (arXiv 2311.12022); the metadata are those of slime's gpqa reward.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwench.errors import RewardError
from qwench.rewards.boxed import after_thinking, last_box
from qwench.samples import Json, Verdict

_MOST_LETTERS = 10
_LETTER = r"[*_$]*(?:\(([A-Za-z])\)|([A-Z]))(?![\w'])"
"""Capital, or in parentheses: `a` is an article."""
_IN_BOX = re.compile(r"^(?:\\(?:text|textbf|mathrm|mathbf)\{)?\s*\(?([A-Za-z])(?:[).:,}]|\s*$)")
_ANSWER = re.compile(r"\b(?i:answer)(?:\s+is)?\s*[:=]?\s*(?:(?i:option|choice)\s+)?" + _LETTER)
_OPTION = re.compile(
    r"\b(?i:option|choice)(?:\s+is)?\s*[:=]?\s*" + _LETTER + r"|(?<![\w'])\(?([A-Z])\)?[*_$]*\s+is\s+(?:the\s+)?correct"
)
_ALONE = re.compile(r"(?<![\w'])([A-Z])(?![\w'])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The options of a question, and the right one."""

    letters: tuple[str, ...]
    right_letter: str | None
    right_texts: tuple[str, ...]
    """Texts of the right option, without its letter."""


def grade(response: str, label: str, metadata: Mapping[str, Json]) -> Verdict:
    """Judge the option that the response chooses.

    Raises:
        RewardError: neither label nor metadata say which option is right.
    """
    question = read_question(label, metadata)
    text = after_thinking(response)
    text = response if text is None else text
    chosen = chosen_letter(text, question.letters)
    if chosen is not None and question.right_letter is not None:
        right = chosen == question.right_letter
        return Verdict(score=float(right), reason="exact" if right else "wrong", extra={"pred": chosen})
    stated = f" {_plain(text)} "
    if any(f" {right} " in stated for right in question.right_texts):
        return Verdict(score=1.0, reason="stated_text")
    return Verdict(score=0.0, reason="no_choice" if chosen is None else "wrong")


def chosen_letter(text: str, letters: Sequence[str]) -> str | None:
    """Return the letter that a text settles on, if it is one of these; of statements of one kind the last one."""
    boxed = _IN_BOX.findall((last_box(text) or "").strip())
    for found in (boxed, *(pattern.findall(text) for pattern in (_ANSWER, _OPTION, _ALONE))):
        valid = [letter for match in found if (letter := "".join(match).upper()) in letters]
        if valid:
            return valid[-1]
    return None


def read_question(label: str, metadata: Mapping[str, Json]) -> Question:
    """Return the question that a row's label and metadata describe.

    Raises:
        RewardError: they do not say which option is right.
    """
    choices = metadata.get("choices") or ()
    if isinstance(choices, str):
        raise RewardError(
            f"--rm-type gpqa needs metadata.choices as a list or an object, got the text {choices[:40]!r}; correct the rows."
        )
    texts = [str(choice) for choice in (choices.values() if isinstance(choices, Mapping) else choices)]
    given = metadata.get("valid_letters") or (choices.keys() if isinstance(choices, Mapping) else ())
    letters = tuple(str(letter).upper() for letter in given) or tuple(string.ascii_uppercase[: len(texts) or _MOST_LETTERS])
    right = _right_letter(label.strip(), letters, texts, metadata)
    right_texts = [text for letter, text in zip(letters, texts, strict=False) if letter == right]
    right_texts += [str(metadata[key]) for key in ("correct_answer", "answer_text") if metadata.get(key)]
    if right is None and not texts:
        right_texts.append(label)
    plain = tuple(text for text in map(_plain, right_texts) if text)
    if right is None and not plain:
        raise RewardError(
            f"--rm-type gpqa needs the right option as label or metadata.correct_letter; the label {label!r} is none of the "
            f"options {', '.join(letters)}{' nor of their texts' if texts else ''}."
        )
    return Question(letters=letters, right_letter=right, right_texts=plain)


def _right_letter(label: str, letters: Sequence[str], texts: Sequence[str], metadata: Mapping[str, Json]) -> str | None:
    said = metadata.get("correct_letter")
    if said is not None:
        letter = str(said).strip().upper()
        if letter not in letters:
            raise RewardError(f"metadata.correct_letter {said!r} is none of the options {', '.join(letters)}; correct the row.")
        return letter
    if label.upper() in letters:
        return label.upper()
    for letter, text in zip(letters, texts, strict=False):
        if _plain(text) == _plain(label):
            return letter
    return letters[int(label)] if label.isdecimal() and int(label) < len(letters) else None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
