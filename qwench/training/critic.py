"""The critic: a second trained model, by default on the policy's ranks, where it computes in turn with the policy.

    policy awake, critic asleep --turn--> policy asleep, critic awake --end of turn--> policy awake, critic asleep

Only one of them takes device memory at a time. On ranks of its own (`critic_learner`) the critic takes no turns. It is a
`Trainer` whose `forward` returns values instead of log-probs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qwench.algorithms.columns import RolloutBatch
from qwench.algorithms.method import Method
from qwench.checkpoints.formats.sources import PartReader
from qwench.models.architecture import Architecture
from qwench.models.tensor_parts import HostMemory, Part
from qwench.training.offload import release_cache
from qwench.training.passes import Passes
from qwench.training.trainer import Trainer

_logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
CRITIC_FOLDER = "critic"
"""In the folder of a checkpoint."""


class Critic:
    """See the module docstring. Methods are collective."""

    def __init__(self, trainer: Trainer, policy: Trainer) -> None:
        """Put the critic to sleep until its first turn."""
        self._trainer, self._policy = trainer, policy
        _send_to_sleep(trainer)

    @contextmanager
    def turn(self) -> Iterator[Trainer]:
        """Give the critic the device until the end of the block."""
        _send_to_sleep(self._policy)
        self._trainer.wake()
        yield self._trainer
        _send_to_sleep(self._trainer)
        self._policy.wake()

    def save(self, folder: Path, *, with_optimizer: bool) -> None:
        """Write the critic under the checkpoint in `folder`."""
        with self.turn() as trainer:
            save_critic(trainer, folder, with_optimizer=with_optimizer)

    def load(self, folder: Path, *, weights_only: bool) -> None:
        """Read the critic of the checkpoint in `folder`, if there is one."""
        with self.turn() as trainer:
            load_critic(trainer, folder, weights_only=weights_only)


def _send_to_sleep(trainer: Trainer) -> None:
    """Give its memory back to the device: as blocks of torch's cache it has other sizes than what the other model takes."""
    trainer.sleep()
    release_cache(trainer.device)


def save_critic(critic: Trainer, folder: Path, *, with_optimizer: bool) -> None:
    """Write an awake critic under the checkpoint in `folder`; collective."""
    (folder / CRITIC_FOLDER).mkdir(exist_ok=True)
    critic.save(folder / CRITIC_FOLDER, with_optimizer=with_optimizer)


def load_critic(critic: Trainer, folder: Path, *, weights_only: bool) -> None:
    """Read an awake critic from the checkpoint in `folder`; without one, that from the start stays. Collective."""
    if (folder / CRITIC_FOLDER).is_dir():
        critic.load(folder / CRITIC_FOLDER, weights_only=weights_only, with_rng=False)
    else:
        _logger.warning("%s has no critic: it starts from --critic-load or the policy's first weights", folder)


def train_critic(
    critic: Trainer, steps: Sequence[RolloutBatch], method: Method, passes: Passes, *, forgets_moments: bool
) -> list[dict[str, float]]:
    """Take an optimizer step of an awake critic for each batch, and return the metrics of each; collective.

    Args:
        steps: batches with values, returns and token weights.
        forgets_moments: start with a fresh optimizer.

    Raises:
        TrainingError: a loss or gradient norm is not finite.
    """
    if forgets_moments:
        critic.forget_moments()
    taken = list[dict[str, float]]()
    for k, step in enumerate(steps, 1):
        with passes.packed(step, f"critic {k}/{len(steps)}") as (micro_batches, after_each):
            sums = critic.forward_backward(
                micro_batches,
                method.value_loss,
                temperature=passes.temperature,
                with_entropy=False,
                after_each=after_each,
            )
        result = critic.optim_step(sums)
        metrics = {**result.metrics, "critic_grad_norm": result.grad_norm, "critic_lr": result.learning_rates[0]}
        taken.append({f"train/{name}": value for name, value in metrics.items()})
    return taken


class NewHead:
    """The weights of a language model with a value head of zeros in the place of its head."""

    def __init__(self, source: PartReader, critic: Architecture) -> None:
        self._source = source
        self._shape = critic.parameter_shapes()[HEAD]

    def read(self, name: str) -> Tensor:
        """Read one parameter to the host; see `TensorReader`."""
        return torch.zeros(self._shape) if name == HEAD else self._source.read(name)

    def read_part(self, name: str, part: Part, memory: HostMemory) -> Tensor:
        """Read a part of one parameter to the host; see `PartReader`."""
        return part.of(self.read(name)) if name == HEAD else self._source.read_part(name, part, memory)
