"""Frozen weights that score: a copy of the policy's on the host, or the base model under adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwench.algorithms.columns import MicroBatch
from qwench.training.trainer import Scores, Trainer


class Reference:
    """A view of the policy's trainer with frozen weights; scores as a `Trainer` does. All methods are collective.

    The copy waits on the host. The model holds it during `forward` and `save` alone; in that time the policy's weights wait on
    the host, and nothing else may compute with them. So no second model takes device memory.
    """

    def __init__(self, policy: Trainer) -> None:
        """Begin with the weights that `policy` holds."""
        self._policy = policy
        self._weights = policy.copy_held_weights()

    def update(self) -> None:
        """Copy the policy's current weights."""
        self._weights = self._policy.copy_held_weights()

    def forward(self, micro_batches: Sequence[MicroBatch], *, temperature: float, with_entropy: bool = False) -> Scores:
        """Score the labels under the reference's weights."""
        with self._weights.swapped_in():
            return self._policy.forward(micro_batches, temperature=temperature, with_entropy=with_entropy)

    def save(self, folder: Path) -> None:
        """Write the weights under the empty `folder`."""
        with self._weights.swapped_in():
            self._policy.save_held_weights(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. The policy holds these weights afterwards: load the policy next."""
        self._policy.load(folder, weights_only=True)
        self.update()


class BaseModel:
    """The reference of a policy with adapters: its trainer with the adapters switched off, without a copy of anything."""

    def __init__(self, policy: Trainer) -> None:
        self._policy = policy

    def forward(self, micro_batches: Sequence[MicroBatch], *, temperature: float, with_entropy: bool = False) -> Scores:
        """Score the labels under the frozen model."""
        with self._policy.without_adapters():
            return self._policy.forward(micro_batches, temperature=temperature, with_entropy=with_entropy)
