"""The loss on conversations that are held out."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest

from qwench.data.sft import SftExample
from qwench.samples import Sample
from qwench.training.held_out import HeldOutLoss
from tests.fakes.console import RecordingConsole


class Scores:
    """A learner whose log-prob of a trained token is its id over -10; it notes the chunks that it scores."""

    def __init__(self) -> None:
        self.chunks: list[tuple[int, float]] = []

    def log_probs(self, samples: Sequence[Sample], temperature: float) -> list[list[float]]:
        self.chunks.append((len(samples), temperature))
        assert [sample.sample_id for sample in samples] == list(range(len(samples)))
        return [
            [-token / 10 * trained for token, trained in zip(sample.tokens[-len(mask) :], mask, strict=True)]
            for sample in samples
            for mask in [sample.loss_mask]
        ]


def example(*tokens: int, mask: bytes) -> SftExample:
    return SftExample(tokens=array("l", tokens), loss_mask=mask, prompt_text="p", messages=[])


def test_the_loss_is_the_mean_over_the_trained_tokens_of_all_conversations():
    scores = Scores()
    sets = {
        "long": [example(1, 2, 3, mask=b"\1\1"), example(4, 5, 6, 7, mask=b"\1\0\1"), example(8, 9, mask=b"\1")],
        "short": [example(1, 20, mask=b"\1")],
    }
    held_out = HeldOutLoss(scores, sets, temperature=0.5, chunk=2, console=(console := RecordingConsole()))
    # long: (0.2 + 0.3) + (0.5 + 0.7) + 0.9 over 5 tokens, not the mean of the conversations' means
    assert held_out.evaluate() == {"eval/long/loss": pytest.approx(2.6 / 5), "eval/short/loss": pytest.approx(2.0)}
    assert scores.chunks == [(2, 0.5), (1, 0.5), (1, 0.5)]
    shown = [(bar.description, bar.total, bar.steps) for bar in console.progresses]
    assert shown == [("evaluate long", 3, [2, 1]), ("evaluate short", 1, [1])]
