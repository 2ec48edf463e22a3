"""Columns of a rollout and of a micro-batch, and the result of a loss.

    RolloutBatch    B samples, per-token columns response-aligned [R]      input of the advantages
    MicroBatch      packed sequences, columns label-aligned [T]            input of the loss

`training.batch` packs one into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain

import torch
from torch import Tensor

from qwench.errors import QwenchError
from qwench.samples import Sample

_ON_HOST = ("cu_seqlens", "support_counts", "support_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """B samples as columns; the per-token columns are lists of response-aligned tensors on the CPU."""

    tokens: list[Tensor]
    """B x [L] int64, prompt then response."""
    loss_mask: list[Tensor]
    """B x [R] bool."""
    rewards: Tensor
    """[B] float32."""
    graded: Tensor
    """[B] bool; false where the reward is no judgement, because the grader failed or ran out of time."""
    group_ids: Tensor
    """[B] int64, equal for the samples of one prompt."""
    execution_ids: Tensor
    """[B] int64, equal for samples that one execution returned; losses are averaged over executions."""
    reward_parts: Tensor | None = None
    """[B, M] float32 of M rewards apart, without weights; 0 where not graded. None: not every sample has the same ones."""
    overlong_penalties: Tensor | None = None
    """[B] float32, 0 or less: what `rewards` lost for the length of the response. None: nothing."""
    rollout_log_probs: list[Tensor] | None = None
    """B x [R] float32 of the sampling engine; None when nothing was sampled (SFT)."""
    support_counts: list[Tensor] | None = None
    """B x [R] int64: how many tokens top-p, top-k and min-p kept; 0 outside of loss_mask. None: sampling cut nothing off."""
    support_ids: list[Tensor] | None = None
    """B x [N] int32: the kept tokens, position by position (see `algorithms.support`)."""
    staleness: list[Tensor] | None = None
    """B x [R] int64: weight versions between the one that sampled a token and this rollout's. None: 0 everywhere."""
    old_log_probs: list[Tensor] | None = None
    """B x [R] float32 of the policy before this rollout's first step."""
    old_entropy: list[Tensor] | None = None
    """B x [R] float32 of the same policy; 0 outside of loss_mask. None: without --use-rollout-entropy."""
    ref_log_probs: list[Tensor] | None = None
    """B x [R] float32 of the reference."""
    teacher_log_probs: list[Tensor] | None = None
    """B x [R] float32 of the teacher (--use-opd)."""
    teacher_kl: list[Tensor] | None = None
    """B x [R] float32: reverse KL to the teacher over the likeliest tokens. None: that of the sampled token."""
    advantages: list[Tensor] | None = None
    """B x [R] float32."""
    loss_weights: list[Tensor] | None = None
    """B x [R] float32: the share of each token in the step's loss, which is the sum of weight * token loss over all tokens.
    Micro-batches and ranks do not change it (see `algorithms.reduction`)."""

    values: list[Tensor] | None = None
    """B x [R] float32 of the critic before this rollout's first step: of the context before each token."""
    returns: list[Tensor] | None = None
    """B x [R] float32 that the critic's values are trained on."""
    loss_scale: list[Tensor] | None = None
    """B x [R] float32: factors on the loss that metrics do not have. None: 1."""
    importance_scale: list[Tensor] | None = None
    """B x [R] float32: factors on the importance weights (`--tis-batch-normalize`). None: 1."""
    picked: list[Tensor] | None = None
    """B x [R] float32: 1 at the tokens that the method treats apart (clip_cov, kl_cov)."""
    fresh_scale: list[Tensor] | None = None
    """B x [R] float32: with it a weighted sum over all tokens is the weighted mean over those of the current version: 0 at
    stale tokens. None: no token is stale."""
    stale_scale: list[Tensor] | None = None
    """The same of the stale tokens."""
    step_share: list[Tensor] | None = None
    """B x [R] float32, equal at all tokens: 1 / (executions of the step), with --calculate-per-token-loss 1 / (tokens of the
    step). None: no function of the user reduces the loss."""

    @classmethod
    def from_samples(cls, samples: Sequence[Sample], *, version: int | None = None, truncated: bool = False) -> RolloutBatch:
        """Read samples; one without tokens to train on keeps its place with an all-false mask.

        Samples that an engine drew must be graded; those read from a data set (SFT) have no log-probs and need no reward.

        Args:
            version: weight version of the policy that will learn. None: staleness does not matter.
            truncated: sampling cut tokens off, so every trained token must have those that were kept.
        """
        sampled = any(any(sample.loss_mask) and any(sample.rollout_log_probs) for sample in samples)
        for sample in samples:
            _check(sample, sampled=sampled)
        support_counts, support_ids = _support(samples, truncated=truncated)
        return cls(
            tokens=[torch.tensor(sample.tokens, dtype=torch.int64) for sample in samples],
            loss_mask=[torch.tensor(sample.loss_mask, dtype=torch.bool) for sample in samples],
            rewards=torch.tensor([float(sample.reward or 0.0) for sample in samples], dtype=torch.float32),
            reward_parts=_parts(samples),
            graded=torch.tensor([sample.graded for sample in samples], dtype=torch.bool),
            group_ids=torch.tensor([sample.group_id for sample in samples], dtype=torch.int64),
            execution_ids=torch.tensor([sample.execution_id for sample in samples], dtype=torch.int64),
            rollout_log_probs=[torch.tensor(s.rollout_log_probs, dtype=torch.float32) for s in samples] if sampled else None,
            support_counts=support_counts,
            support_ids=support_ids,
            staleness=_staleness(samples, version) if sampled and version is not None else None,
            teacher_log_probs=_taught([sample.teacher_log_probs for sample in samples], samples),
            teacher_kl=_taught([sample.teacher_kl for sample in samples], samples),
        )

    @property
    def lengths(self) -> list[int]:
        """Return L of each sample."""
        return [len(tokens) for tokens in self.tokens]

    def select(self, indices: Sequence[int]) -> RolloutBatch:
        """Return the samples at `indices`, in that order, with every column."""
        picked: dict[str, Tensor | list[Tensor] | None] = {}
        for column in fields(self):
            value = getattr(self, column.name)
            picked[column.name] = value[list(indices)] if isinstance(value, Tensor) else value and [value[i] for i in indices]
        return RolloutBatch(**picked)  # type: ignore[arg-type]  # the loop keeps every column's own type

    def with_columns(self, **columns: list[Tensor] | Tensor) -> RolloutBatch:
        """Return the batch with columns set."""
        return replace(self, **columns)  # type: ignore[arg-type]  # checked by the dataclass's own field names


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """S packed sequences for one forward on one rank; position t predicts `labels[t]`."""

    tokens: Tensor
    """[T] int64, sequences back to back."""
    positions: Tensor
    """[T] int64, from 0 in each sequence."""
    labels: Tensor
    """[T] int64, the next token of the same sequence; 0 at each sequence's last position."""
    cu_seqlens: Tensor
    """[S + 1] int32 on the host, starts of the sequences and the end."""
    loss_mask: Tensor
    """[T] bool, true where the label is trained on."""
    loss_weights: Tensor | None = None
    """[T] float32, 0 where loss_mask is false."""
    rollout_log_probs: Tensor | None = None
    """[T] float32; this and the other optional columns are 0 outside the response."""
    old_log_probs: Tensor | None = None
    old_entropy: Tensor | None = None
    ref_log_probs: Tensor | None = None
    support_counts: Tensor | None = None
    """[T] int64."""
    support_ids: Tensor | None = None
    """[N] int32, of all positions back to back."""
    advantages: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    loss_scale: Tensor | None = None
    importance_scale: Tensor | None = None
    picked: Tensor | None = None
    fresh_scale: Tensor | None = None
    stale_scale: Tensor | None = None
    step_share: Tensor | None = None
    response_lengths: tuple[int, ...] = ()
    """R of each sequence; an idle micro-batch has one token outside of the mask."""
    indices: tuple[int, ...] = ()
    """S positions of the sequences in the batch that was packed; empty in an idle micro-batch."""

    @property
    def num_tokens(self) -> int:
        """Return T."""
        return int(self.tokens.shape[0])

    @property
    def lengths(self) -> list[int]:
        """Return the S sequence lengths."""
        return self.cu_seqlens.diff().tolist()

    @property
    def sequence_ids(self) -> Tensor:
        """Return [T] int64, which of the S sequences a position belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.cu_seqlens.diff().long()).to(self.tokens.device)

    def to(self, device: torch.device) -> MicroBatch:
        """Move every column but those of `_ON_HOST` to `device`."""
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        for name, value in columns.items():
            if isinstance(value, Tensor) and name not in _ON_HOST:
                columns[name] = on_device(value, device)
        return MicroBatch(**columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLoss:
    """A micro-batch's contribution to the step: sums over its tokens, already divided by the step's global counts."""

    loss: Tensor
    """Scalar float32 that carries the gradient."""
    metrics: Mapping[str, Tensor]
    """Detached scalar float32 sums, to be added over micro-batches and data-parallel ranks."""
    peaks: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalar float32 values, not negative; the step's is the largest over micro-batches and ranks."""


LossFunction = Callable[[Tensor, Tensor | None, MicroBatch], TokenLoss]
"""(log_probs [T] float32, entropy [T] float32 or None, micro_batch) -> TokenLoss."""


def trained(columns: Sequence[Tensor], loss_mask: Sequence[Tensor]) -> Tensor:
    """Return the [N] values of the trained tokens, sample after sample, of a column B x [R] whose mask is B x [R] bool."""
    return torch.cat([column[mask] for column, mask in zip(columns, loss_mask, strict=True)])


def _support(samples: Sequence[Sample], *, truncated: bool) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """Return counts and ids of the tokens that sampling kept; None where it cut nothing off."""
    if not truncated and not any(sample.support for sample in samples):
        return None, None
    for sample in samples:
        kept = sample.support or [[]] * sample.response_length
        if len(kept) != sample.response_length or any(on and not ids for on, ids in zip(sample.loss_mask, kept, strict=True)):
            raise QwenchError(
                f"sample {sample.sample_id} has trained tokens without the tokens that sampling kept beside them: the function "
                "that made it must keep Sample.support, or leave --rollout-top-p, --rollout-top-k and --rollout-min-p out."
            )
    counts = [[len(ids) for ids in sample.support] or [0] * sample.response_length for sample in samples]
    ids = [torch.tensor([*chain(*sample.support)], dtype=torch.int32) for sample in samples]
    return [torch.tensor(column, dtype=torch.int64) for column in counts], ids


def _staleness(samples: Sequence[Sample], version: int) -> list[Tensor] | None:
    """Return how many versions old each token is; None where every trained token is of this version."""
    columns = [
        torch.tensor([version - of if of >= 0 else 0 for of in sample.weight_versions], dtype=torch.int64) for sample in samples
    ]
    masks = [torch.tensor(sample.loss_mask, dtype=torch.bool) for sample in samples]
    return columns if trained(columns, masks).any() else None


def _parts(samples: Sequence[Sample]) -> Tensor | None:
    """Return the rewards apart; None: a graded sample has none, or other ones. An ungraded one has 0."""
    parts = [(sample.verdict.parts if sample.verdict is not None else {}) if sample.graded else None for sample in samples]
    names = next((list(one) for one in parts if one), [])
    if not names or any(one is not None and list(one) != names for one in parts):
        return None
    return torch.tensor([[0.0 if one is None else one[name] for name in names] for one in parts], dtype=torch.float32)


def _taught(columns: Sequence[Sequence[float]], samples: Sequence[Sample]) -> list[Tensor] | None:
    """Return a column that a teacher on a server has set; None: one of the samples lacks it."""
    if not any(columns) or any(len(column) != one.response_length for column, one in zip(columns, samples, strict=True)):
        return None
    return [torch.tensor(column, dtype=torch.float32) for column in columns]


def _check(sample: Sample, *, sampled: bool) -> None:
    """Assert what `pack` relies on."""
    where = f"sample {sample.sample_id}"
    assert len(sample.loss_mask) == sample.response_length, f"{where}: mask and response differ"
    assert len(sample.tokens) > sample.response_length, f"{where}: nothing predicts the first response token"
    if sampled:
        assert sample.reward is not None, f"{where} is not graded"
        assert len(sample.rollout_log_probs) == sample.response_length, f"{where}: log-probs and response differ"


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device (or the tensor, if it is there). The host does not wait for work of the device."""
    if device.type == "cuda" and not tensor.is_cuda:
        # From ordinary memory a copy waits until the device has done all that came before it.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
