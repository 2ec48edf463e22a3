"""The models of one rank: save and load them, move them off the device, publish their weights.

iter_*/            the policy: model, optimizer, schedule, RNG
iter_*/reference   the reference, when it moves (--ref-update-interval)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwench.training.reference import Reference
from qwench.training.trainer import Trainer
from qwench.weights.broadcast import BroadcastLink
from qwench.weights.remote import PublicationPlan, publish_from_rank
from qwench.wire.addresses import EngineAddress
from qwench.wire.portions import WeightBucket

_REFERENCE_FOLDER = "reference"


class TrainingState:
    """See the module docstring. All methods but `shared_weights` are collective."""

    def __init__(self, policy: Trainer, reference: Reference | None, *, reference_moves: bool) -> None:
        self.policy = policy
        self.reference = reference
        self._moving_reference = reference if reference_moves else None
        self._link = BroadcastLink()

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write everything that a resumed run needs under the empty `folder`."""
        self.policy.save(folder, with_optimizer=with_optimizer)
        if self._moving_reference is not None:
            (folder / _REFERENCE_FOLDER).mkdir(exist_ok=True)
            self._moving_reference.save(folder / _REFERENCE_FOLDER)

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read what `save` wrote. Without a saved reference, the one from the start stays."""
        if self._moving_reference is not None and (folder / _REFERENCE_FOLDER).is_dir():
            self._moving_reference.load(folder / _REFERENCE_FOLDER)
        self.policy.load(folder, weights_only=weights_only, with_rng=with_rng)

    def weights(self, *, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Yield the policy's weights under Hugging Face names in buckets."""
        return self.policy.weights(bucket_bytes=bucket_bytes)

    def shared_weights(self) -> Mapping[str, Tensor] | None:
        """Return the policy's live tensors when this process owns them whole in the publication dtype; else None."""
        return self.policy.shared_weights()

    def publish(self, addresses: Sequence[EngineAddress], version: int, plan: PublicationPlan) -> None:
        """Bring the policy's weights to engines in other processes under `version`. See `publish_from_rank`."""
        publish_from_rank(self, addresses, version, plan, link=self._link)

    def release_cache(self) -> None:
        """Free device memory that torch caches."""
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    def sleep(self) -> None:
        """Move what the next forward does not need at once from the device to the host."""
        self.policy.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        self.policy.wake()

    def close(self) -> None:
        """Close the connections that publications share."""
        self._link.close()
