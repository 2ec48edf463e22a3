"""The critic: a second trained model on the policy's ranks, which computes in turn with the policy.

    policy awake, critic asleep --turn--> policy asleep, critic awake --end of turn--> policy awake, critic asleep

Only one of them takes device memory at a time. The critic is a `Trainer` whose `forward` returns values instead of log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qwench.checkpoints.formats.sources import TensorReader
from qwench.models.architecture import Architecture
from qwench.training.trainer import Trainer

HEAD = "lm_head.weight"
CRITIC_FOLDER = "critic"
"""In the folder of a checkpoint."""


class Critic:
    """See the module docstring. Methods are collective."""

    def __init__(self, trainer: Trainer, policy: Trainer) -> None:
        """Put the critic to sleep until its first turn."""
        self._trainer, self._policy = trainer, policy
        trainer.sleep()

    @contextmanager
    def turn(self) -> Iterator[Trainer]:
        """Give the critic the device until the end of the block."""
        self._policy.sleep()
        self._trainer.wake()
        yield self._trainer
        self._trainer.sleep()
        self._policy.wake()

    def save(self, folder: Path, *, with_optimizer: bool) -> None:
        """Write the critic under the checkpoint in `folder`."""
        (folder / CRITIC_FOLDER).mkdir(exist_ok=True)
        with self.turn() as trainer:
            trainer.save(folder / CRITIC_FOLDER, with_optimizer=with_optimizer)

    def load(self, folder: Path, *, weights_only: bool) -> bool:
        """Read the critic of the checkpoint in `folder`, and tell whether there is one."""
        if not (folder / CRITIC_FOLDER).is_dir():
            return False
        with self.turn() as trainer:
            trainer.load(folder / CRITIC_FOLDER, weights_only=weights_only, with_rng=False)
        return True


class NewHead:
    """The weights of a language model with a value head of zeros in the place of its head."""

    def __init__(self, source: TensorReader, critic: Architecture) -> None:
        self._source = source
        self._shape = critic.parameter_shapes()[HEAD]

    def read(self, name: str) -> Tensor:
        """Read one parameter to the host; see `TensorReader`."""
        return torch.zeros(self._shape) if name == HEAD else self._source.read(name)
