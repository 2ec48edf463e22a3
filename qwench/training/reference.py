"""Frozen weights that score: copies of the policy's on the host, or the base model under adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwench.algorithms.columns import MicroBatch, RolloutBatch, trained
from qwench.training.trainer import Scorer, Scores, Trainer


class Reference:
    """A view of the policy's trainer with frozen weights; scores as a `Trainer` does. All methods are collective.

    The copy waits on the host. The model holds it during `forward` and `save` alone, and nothing else may compute with the
    policy's weights in that time (see `HostCopy.swapped_in`). So no second model takes memory while the policy trains.
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


class FrozenTeacher:
    """Another model in the place of the frozen one under adapters, which are switched off while it scores.

    It waits on the host, as a `Reference` does. All methods are collective.
    """

    def __init__(self, policy: Trainer, folder: Path) -> None:
        """Read a checkpoint of the policy's architecture."""
        self._policy = policy
        self._weights = policy.copy_for_frozen(folder)

    def forward(self, micro_batches: Sequence[MicroBatch], *, temperature: float, with_entropy: bool = False) -> Scores:
        """Score the labels under the teacher."""
        with self._weights.swapped_in(), self._policy.without_adapters():
            return self._policy.forward(micro_batches, temperature=temperature, with_entropy=with_entropy)


_logger = logging.getLogger(__name__)


class PastPolicies:
    """The policy as it was at past publications, for old log-probs of the weights that sampled (--keep-old-actor).

        rollout 5, one rollout ahead: sampled by the weights of version 4 -> scored by them -> version 5 is kept in their place

    They are part of a checkpoint. All methods are collective.
    """

    def __init__(self, policy: Trainer, *, num_kept: int) -> None:
        """Keep the weights of the last `num_kept` versions before the policy's own."""
        self._policy = policy
        self._num_kept = num_kept
        self._kept: dict[int, Reference] = {}
        self._has_warned = False

    def score(self, batch: RolloutBatch, version: int, score: Callable[[Scorer], list[Tensor]]) -> list[Tensor]:
        """Score every token by the weights that sampled it, then keep the policy's weights of `version`.

        Args:
            score: returns B x [R] of all ranks under a model.
        """
        # Those of a checkpoint are of versions to come where the run begins anew from it.
        self._kept = {kept: weights for kept, weights in self._kept.items() if kept < version}
        ages = (
            [torch.zeros_like(mask, dtype=torch.int64) for mask in batch.loss_mask]
            if batch.staleness is None
            else batch.staleness
        )
        scored = [torch.zeros(len(age)) for age in ages]
        for age in sorted({*trained(ages, batch.loss_mask).tolist()}):
            columns = score(self._of(version - age, version))
            scored = [torch.where(own == age, columns[i], scored[i]) for i, own in enumerate(ages)]
        self._keep(version)
        return scored

    def save(self, folder: Path) -> None:
        """Write each version under `folder`, which is made."""
        for version, weights in self._kept.items():
            place = folder / str(version)
            place.mkdir(parents=True, exist_ok=True)
            weights.save(place)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. The policy holds other weights afterwards: load the policy next."""
        for place in sorted(folder.iterdir() if folder.is_dir() else (), key=lambda one: int(one.name))[-self._num_kept :]:
            self._kept[int(place.name)] = weights = Reference(self._policy)
            weights.load(place)

    def _of(self, version: int, own: int) -> Scorer:
        """Return the weights of a version; the next newer ones where they are not kept."""
        if version == own:
            return self._policy
        if version not in self._kept and not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "--keep-old-actor: the weights of version %d are not kept; rollout %d gets old log-probs of newer ones. "
                "This is said once.",
                version,
                own,
            )
        newer = [kept for kept in self._kept if kept >= version]
        return self._kept[min(newer)] if newer else self._policy

    def _keep(self, version: int) -> None:
        if len(self._kept) < self._num_kept:
            self._kept[version] = Reference(self._policy)
            return
        oldest = self._kept.pop(min(self._kept))
        oldest.update()
        self._kept[version] = oldest
