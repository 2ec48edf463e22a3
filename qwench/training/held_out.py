"""The loss of fine-tuning on conversations that are held out (--eval-prompt-data).

eval/<set>/loss    negative log-likelihood per trained token, over all conversations of the set
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from qwench.data.cursor import Draw
from qwench.data.sft import SftExample
from qwench.observability.console import Console
from qwench.samples import Sample


class ScoresSamples(Protocol):
    """A learner, here or on ranks."""

    def log_probs(self, samples: Sequence[Sample], temperature: float) -> list[list[float]]:
        """Return the log-probs [R] of each sample's response, 0 where it is not trained on."""
        ...


class HeldOutLoss:
    """Measures the loss with the learner that trains, packed as it packs."""

    def __init__(
        self,
        learner: ScoresSamples,
        sets: Mapping[str, Sequence[SftExample]],
        *,
        temperature: float,
        chunk: int,
        console: Console,
    ) -> None:
        """Keep the sets.

        Args:
            temperature: of the training loss.
            chunk: conversations that are scored at once.
        """
        self._learner, self._sets, self._console = learner, sets, console
        self._temperature, self._chunk = temperature, chunk

    def evaluate(self) -> dict[str, float]:
        """Return the loss of each set. Collective."""
        return {f"eval/{name}/loss": self._loss(name, examples) for name, examples in self._sets.items()}

    def _loss(self, name: str, examples: Sequence[SftExample]) -> float:
        sums, num_tokens = list[float](), 0
        with self._console.progress(f"evaluate {name}", total=len(examples)) as progress:
            for start in range(0, len(examples), self._chunk):
                samples = [
                    example.to_sample(Draw(row=i, group_id=i, first_sample_id=i))
                    for i, example in enumerate(examples[start : start + self._chunk])
                ]
                sums += [math.fsum(row) for row in self._learner.log_probs(samples, self._temperature)]
                num_tokens += sum(sum(sample.loss_mask) for sample in samples)
                progress.advance(len(samples))
        return -math.fsum(sums) / num_tokens
