"""Shared words, worked out by hand."""

from __future__ import annotations

import pytest

from qwench.rewards.f1 import grade, words

CASES = [
    ("The cat sat.", "a cat sat", 1.0, "exact"),
    ("cat", "cat sat", 2 / 3, "shared_words"),  # precision 1, recall 1/2
    ("a b c d", "b c x", 2 * 2 / (3 + 3), "shared_words"),  # `a` is an article: b c d against b c x
    ("cat cat cat", "cat sat", 2 * 1 / (3 + 2), "shared_words"),
    ("dog", "cat", 0.0, "wrong"),
    ("", "cat", 0.0, "wrong"),
    ("", "", 0.0, "wrong"),
    ("Yes!", "yes", 1.0, "exact"),
    ("yes it is", "yes", 0.0, "wrong"),
    ("no", "no answer", 0.0, "wrong"),
    ("noanswer given", "noanswer", 0.0, "wrong"),
]


@pytest.mark.parametrize(("response", "label", "score", "reason"), CASES)
def test_score_is_the_harmonic_mean_of_precision_and_recall(response, label, score, reason):
    verdict = grade(response, label)
    assert verdict.score == pytest.approx(score) and verdict.reason == reason


def test_words_are_lower_case_without_punctuation_and_articles():
    assert words("The U.S.A., an Example (of) it!") == ["usa", "example", "of", "it"]
