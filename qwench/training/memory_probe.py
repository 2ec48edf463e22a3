"""One pass over the largest legal micro-batch before the first rollout: too little memory shows in the first minute.

    longest sequences, up to the limit of a micro-batch --forward, backward--> gradients --dropped--> state as before

Weights, moments, random numbers, step counts and metrics stay as they are.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from qwench.algorithms.columns import MicroBatch, RolloutBatch, TokenLoss
from qwench.config.plan import RunPlan
from qwench.config.sections.training import TrainingConfig
from qwench.data.packing import pack_by_count, pack_by_tokens
from qwench.errors import TrainingError
from qwench.models.memory import gib
from qwench.training.batch import pack
from qwench.training.critic import Critic
from qwench.training.memory_budget import kept_bytes
from qwench.training.packed_decoder import Keep
from qwench.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Longest:
    """The longest sequence that the limits allow."""

    num_tokens: int
    flag: str
    """Limits it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryProbe:
    """See the module docstring. The same on every rank; picklable."""

    lengths: tuple[int, ...]
    """Tokens of each sequence of the micro-batch."""
    num_micro_batches: int
    """The second one meets the gradients of the first; a pipeline holds one for each stage."""
    vocab_size: int
    temperature: float
    with_entropy: bool
    flag: str
    """Makes the micro-batch smaller."""
    state_bytes: int
    """Predicted weights, gradients and optimizer state of a rank."""
    activation_bytes: int
    """Predicted activations and logits of a rank whose trainer has no `ActivationBudget`."""
    engine_bytes: int = 0
    """Weights that an engine of the same process holds besides the trainer's."""
    of_critic: MemoryProbe | None = None
    """The probe of the critic's own ranks. None: it has none."""

    @classmethod
    def of(
        cls,
        plan: RunPlan,
        training: TrainingConfig,
        longest: Longest,
        *,
        temperature: float,
        with_entropy: bool,
        dtype: torch.dtype,
        engine_bytes: int = 0,
        of_critic: MemoryProbe | None = None,
    ) -> MemoryProbe:
        """Derive the largest micro-batch that `MicroBatching` can pack, and predict its memory."""
        lengths = largest_lengths(plan, longest.num_tokens)
        flag = "--micro-batch-size" if plan.micro_batch_tokens is None else "--max-tokens-per-gpu"
        per_rank = -(-plan.batch.global_batch_size // (plan.dp_size * len(lengths)))
        num_micro_batches = min(max(2, plan.layout.pp), per_rank)
        num_tokens, layout = -(-sum(lengths) // plan.layout.cp), plan.layout
        keep = Keep.NOTHING if training.recomputes_layers else Keep.ALL
        kept = kept_bytes(plan.model, num_tokens, keep, dtype) * min(num_micro_batches, layout.pp) // (layout.tp * layout.pp)
        logits = 4 * min(num_tokens, training.head_chunk_tokens) * plan.model.vocab_size // layout.tp
        return cls(
            lengths=lengths,
            num_micro_batches=num_micro_batches,
            vocab_size=plan.model.vocab_size,
            temperature=temperature,
            with_entropy=with_entropy,
            flag=flag if len(lengths) > 1 else longest.flag,
            state_bytes=plan.rank_bytes.device,
            activation_bytes=kept + logits,
            engine_bytes=engine_bytes,
            of_critic=of_critic,
        )

    def run(self, policy: Trainer, critic: Critic | None) -> str:
        """Train each model on the micro-batch and drop the gradients; return what it took. Collective.

        Raises:
            TrainingError: the memory of the device does not suffice.
        """
        start, device = time.perf_counter(), policy.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._pass_through(policy, with_entropy=self.with_entropy)
        if critic is not None:
            with critic.turn() as trainer:
                self._pass_through(trainer, with_entropy=False)
        text = f"memory probe: {self._size} took {time.perf_counter() - start:.1f} s"
        if device.type == "cuda":
            peak = policy.max_over_ranks(torch.cuda.max_memory_allocated(device))
            torch.cuda.reset_peak_memory_stats(device)
            text += f" and at most {gib(peak)} of {gib(_memory_bytes(device))} GiB"
        return f"{text}; predicted {self._predicted(policy)}"

    def _pass_through(self, trainer: Trainer, *, with_entropy: bool) -> None:
        micro_batch = self._micro_batch()
        with torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []):
            try:
                trainer.prepare_steps()
                trainer.forward_backward(
                    [micro_batch] * self.num_micro_batches,
                    _loss,
                    temperature=self.temperature,
                    with_entropy=with_entropy,
                    after_each=lambda: None,
                )
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"{self._size}, the largest that the flags allow, does not fit the memory of a trainer rank: predicted "
                    f"{self._predicted(trainer)}, the device has {gib(_memory_bytes(trainer.device))} GiB; lower {self.flag}. "
                    "If no rollout becomes so large, --no-memory-probe starts without the check."
                ) from error
        trainer.drop_gradients()

    def _micro_batch(self) -> MicroBatch:
        """Return sequences of which each token but the first is trained on."""
        count = len(self.lengths)
        batch = RolloutBatch(
            tokens=[torch.arange(length) % self.vocab_size for length in self.lengths],
            loss_mask=[torch.ones(length - 1, dtype=torch.bool) for length in self.lengths],
            rewards=torch.zeros(count),
            graded=torch.ones(count, dtype=torch.bool),
            group_ids=torch.arange(count),
            execution_ids=torch.arange(count),
        )
        return pack(batch, range(count))

    @property
    def _size(self) -> str:
        sequences = f"{len(self.lengths)} sequences" if len(self.lengths) > 1 else "one sequence"
        return f"a micro-batch of {sum(self.lengths)} tokens ({sequences}, the longest of {max(self.lengths)})"

    def _predicted(self, trainer: Trainer) -> str:
        held, activations, budget = self.state_bytes + self.engine_bytes, self.activation_bytes, trainer.activation_budget
        if budget is not None:
            free = _memory_bytes(trainer.device) - held if trainer.device.type == "cuda" else None
            num_tokens = sum(self.lengths)
            activations = budget.predict(num_tokens, num_tokens - len(self.lengths), free=free)
        engine = f" + {gib(self.engine_bytes)} GiB of the engine's own weights" if self.engine_bytes else ""
        return (
            f"{gib(self.state_bytes)} GiB of weights, gradients and optimizer state{engine} + {gib(activations)} GiB of "
            f"activations and logits = {gib(held + activations)} GiB"
        )


def largest_lengths(plan: RunPlan, longest: int) -> tuple[int, ...]:
    """Return the lengths of the sequences in the largest micro-batch: as many of `longest` tokens as fit, then the rest."""
    size, multiple_of = plan.batch.global_batch_size, plan.dp_size
    if plan.micro_batch_tokens is None:
        bins = pack_by_count([longest] * size, samples_per_bin=plan.micro_batch_size, multiple_of=multiple_of)
        return (longest,) * max(map(len, bins))
    most = max(map(len, pack_by_tokens([1] * size, max_tokens=size, multiple_of=multiple_of)))
    # A sequence longer than the cap is a micro-batch alone.
    num_whole, rest = divmod(max(longest, min(plan.micro_batch_tokens, most * longest)), longest)
    return (longest,) * num_whole + ((rest,) if rest > 1 else ())


def _loss(scores: Tensor, entropy: Tensor | None, micro_batch: MicroBatch) -> TokenLoss:
    """Return a loss that takes a gradient from every trained position."""
    if scores.ndim > 1:  # logits
        scores = scores.logsumexp(-1)
    if entropy is not None:
        scores = scores + entropy
    return TokenLoss(loss=(scores * micro_batch.loss_mask).sum(), metrics={})


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
