"""The models of one rank: save and load them, move them off the device, publish the policy's weights.

iter_*/            the policy: model, optimizer, schedule, RNG
iter_*/reference   the reference, when it moves (--ref-update-interval)
iter_*/critic      the critic: model, optimizer, schedule
iter_*/past        the policy's weights of past versions, a folder each (--keep-old-actor)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from qwench.training.critic import Critic
from qwench.training.memory_probe import MemoryProbe
from qwench.training.offload import release_cache
from qwench.training.reference import BaseModel, PastPolicies, Reference
from qwench.training.trainer import Scorer, Trainer
from qwench.weights.broadcast import BroadcastLink
from qwench.weights.plan import PublicationPlan
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress
from qwench.wire.portions import WeightBucket, WeightPart

_REFERENCE_FOLDER, _PAST_FOLDER = "reference", "past"


class TrainingState:
    """See the module docstring. All methods but `shared_weights` are collective."""

    def __init__(
        self,
        policy: Trainer,
        reference: Reference | BaseModel | None,
        *,
        reference_moves: bool,
        critic: Critic | None,
        teacher: Scorer | None,
        past_policies: PastPolicies | None,
    ) -> None:
        """Keep the models.

        Args:
            reference_moves: it is part of a checkpoint.
            teacher: never part of a checkpoint.
        """
        self.policy = policy
        self.reference = reference
        self.critic = critic
        self.teacher = teacher
        self.past_policies = past_policies
        self.moving_reference = reference if reference_moves and isinstance(reference, Reference) else None
        self._link = BroadcastLink()

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write everything that a resumed run needs under the empty `folder`."""
        self.policy.save(folder, with_optimizer=with_optimizer)
        if self.moving_reference is not None:
            (folder / _REFERENCE_FOLDER).mkdir(exist_ok=True)
            self.moving_reference.save(folder / _REFERENCE_FOLDER)
        if self.critic is not None:
            self.critic.save(folder, with_optimizer=with_optimizer)
        if self.past_policies is not None:
            self.past_policies.save(folder / _PAST_FOLDER)

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        """Read what `save` wrote. Without a saved reference or critic, the one from the start stays."""
        if self.moving_reference is not None and (folder / _REFERENCE_FOLDER).is_dir():
            self.moving_reference.load(folder / _REFERENCE_FOLDER)
        if self.critic is not None:
            self.critic.load(folder, weights_only=weights_only)
        if self.past_policies is not None:
            self.past_policies.load(folder / _PAST_FOLDER)
        self.policy.load(folder, weights_only=weights_only, with_rng=with_rng)

    def weights(self, *, bucket_bytes: int, part: WeightPart = "merged") -> Iterator[WeightBucket]:
        """Yield the policy's weights of a part under Hugging Face names in buckets."""
        return self.policy.weights(bucket_bytes=bucket_bytes, part=part)

    def shared_weights(self, part: WeightPart = "merged") -> Mapping[str, Tensor] | None:
        """See `Trainer.shared_weights`."""
        return self.policy.shared_weights(part)

    def publish(self, addresses: Sequence[EngineAddress], version: int, plan: PublicationPlan) -> None:
        """Bring the policy's weights to engines in other processes under `version`. See `publish_from_rank`."""
        publish_from_rank(self, addresses, version, plan, link=self._link)

    def probe_memory(self, probe: MemoryProbe) -> str:
        """Run the probe on the trained models, and return what it took."""
        return probe.run(self.policy, self.critic)

    def release_cache(self) -> None:
        """Give other processes the device memory that torch caches."""
        release_cache(self.policy.device)

    def sleep(self) -> None:
        """Move what the next forward does not need at once from the device to the host; torch caches its memory."""
        self.policy.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        self.policy.wake()

    def close(self) -> None:
        """Close the connections that publications share."""
        self._link.close()
