"""The policy of a run with one rank: the decoder computes with the weights directly, without FSDP2.

    weights in param_dtype, flat --PackedDecoder--> log-probs, entropy
    float32 sums of gradients, flat <--the products themselves--'

The weights are what is published, so an engine in this process computes with them as they are. They are DTensors under their
Hugging Face names, on a mesh of one: optimizer and checkpoints see what they see under FSDP2. Matrices that share an
input lie back to back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from qwench.algorithms.columns import MicroBatch, on_device
from qwench.algorithms.log_probs import logit_bytes, token_log_probs
from qwench.algorithms.support import Support
from qwench.config.sections.training import TrainingConfig
from qwench.models.architecture import Architecture
from qwench.models.decoder.invariant import TILE, padded
from qwench.training.memory_budget import ActivationBudget, free_bytes
from qwench.training.packed_decoder import (
    DecoderTensors,
    Forward,
    Keep,
    PackedDecoder,
    Sequences,
    bind,
    supports,
)
from qwench.training.sequence_attention import attention_of

_ALIGNMENT = 128
"""In elements; matrices that share an input have no gap between them."""
_STACKED = ("k_proj.weight", "v_proj.weight", "up_proj.weight")


_ATTENTIONS = ("sdpa", "varlen", "cudnn")


def can_be_direct(architecture: Architecture, attention: str) -> bool:
    """Tell whether the packed decoder has every part of the model, and the attention that the flags name."""
    return supports(architecture) and attention in _ATTENTIONS


class Flat(Protocol):
    """Tensors in one piece of memory: the weights that are trained, or the sums of their gradients."""

    by_name: dict[str, Tensor]
    """In the order of the memory."""
    bound: DecoderTensors
    """Those of the whole decoder."""


class FlatTensors:
    """Tensors of all weights in one piece of memory, in the order in which the decoder wants them."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        shapes = architecture.parameter_shapes()
        self.by_name = flat_views(shapes, {name for name in shapes if name.endswith(_STACKED)}, dtype, device)
        self.bound = bind(self.by_name, architecture)


def flat_views(
    shapes: Mapping[str, Sequence[int]], stacked: Collection[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return zeros of these shapes in one piece of memory; a stacked tensor has no gap before it."""
    places: dict[str, tuple[int, torch.Size]] = {}
    end = 0
    for name, shape in shapes.items():
        start = end if name in stacked else -(-end // _ALIGNMENT) * _ALIGNMENT
        places[name] = start, torch.Size(shape)
        end = start + places[name][1].numel()
    flat = torch.zeros(end, dtype=dtype, device=device)
    return {name: flat[start : start + shape.numel()].view(shape) for name, (start, shape) in places.items()}


class FlatGradients:
    """Float32 sums of the gradients since the last `drop`; memory is taken when the first one is asked for.

    The tensors stay the same ones: making hundreds of views in each step would keep the device waiting.
    """

    def __init__(self, make: Callable[[], Flat]) -> None:
        self._make = make
        self._sums: Flat | None = None
        self._whole: Tensor | None = None
        """The memory of all sums as one tensor."""

    @property
    def sums(self) -> DecoderTensors:
        """Return the sums that the products add to."""
        return self._made().bound

    def local(self) -> Sequence[Tensor]:
        """Return every gradient, in the order of the weights' names."""
        return list(self._made().by_name.values())

    def drop(self) -> None:
        """Forget the gradients and give their memory back."""
        if self._whole is not None:
            self._whole.untyped_storage().resize_(0)

    def _made(self) -> Flat:
        if self._sums is None or self._whole is None:
            self._sums = self._make()
            first = next(iter(self._sums.by_name.values()))
            self._whole = first.new_empty(0).set_(first.untyped_storage())
        elif not self._whole.untyped_storage().nbytes():
            self._whole.untyped_storage().resize_(self._whole.nbytes)
            self._whole.zero_()
        return self._sums


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyPlace:
    """The ranks and devices of a policy, and how it computes there."""

    mesh: DeviceMesh
    training: TrainingConfig
    device: torch.device
    param_dtype: torch.dtype
    """Of the forward, the backward and the publication."""
    stored_dtype: torch.dtype
    """Of shards that are not computed with as they lie."""
    attention: str


class DirectPolicy:
    """See the module docstring; called like `fsdp.policy.Policy`."""

    def __init__(self, causal_lm: PreTrainedModel, architecture: Architecture, place: PolicyPlace) -> None:
        """Move the weights of `causal_lm`, which keeps them under their names."""
        training, device = place.training, place.device
        self.causal_lm = causal_lm
        self._place = place
        self.gradients = FlatGradients(partial(FlatTensors, architecture, torch.float32, device))
        self._architecture = architecture
        self._device = device
        self._flat: FlatTensors | None = None
        self._head_chunk_tokens = training.head_chunk_tokens
        self._invariant = training.batch_invariant and device.type == "cpu" and place.mesh.size() == 1
        """Log-probs have the same bits in every micro-batch."""
        self._decoder = PackedDecoder(architecture, device, invariant=self._invariant)
        self.activation_budget = ActivationBudget(
            architecture=architecture,
            param_dtype=place.param_dtype,
            head_chunk_tokens=training.head_chunk_tokens,
            recomputes=training.recomputes_layers,
            logit_bytes=logit_bytes(device, place.param_dtype, architecture.hidden_size),
        )
        self._trigger = torch.zeros((), device=device, requires_grad=True)
        self._weights = _move_weights(causal_lm, self._held_tensors(), place.mesh)

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters under their Hugging Face names, in the order of the gradients."""
        return dict(self._weights)

    def computed(self) -> FlatTensors:
        """Return the memory of the weights that passes compute with, which is taken when it is first asked for."""
        if self._flat is None:
            self._flat = FlatTensors(self._architecture, self._place.param_dtype, self._device)
        return self._flat

    def _bound(self) -> DecoderTensors:
        """Return the weights that the next pass computes with."""
        return self.computed().bound

    def _held_tensors(self) -> Mapping[str, Tensor]:
        """Return the memory of this rank's part of every weight."""
        return self.computed().by_name

    def begin(self) -> None:
        """Prepare passes: the weights lie as they are computed with."""

    def end_scoring(self) -> None:
        """End a run of forwards; there is nothing to free."""

    def reduce_in_next_backward(self, *, whole: bool, is_last: bool) -> None:
        """Take note of the last micro-batch of a step: the sums of one rank are those of the step."""

    def release(self) -> None:
        """Give the memory of rounded weights back: there are none besides the weights."""

    def __call__(self, micro_batch: MicroBatch, *, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """See `Policy.forward`."""
        weights, device = self._bound(), self._device
        scored = micro_batch.loss_mask.nonzero().squeeze(-1)
        labels = on_device(micro_batch.labels[scored], device)
        support = Support.of(micro_batch, scored)
        scored = on_device(scored, device)
        sequences = Sequences(
            tokens=on_device(micro_batch.tokens, device),
            positions=on_device(micro_batch.positions, device),
            scored=scored,
            attention=attention_of(self._place.attention, micro_batch.lengths, device, invariant=self._invariant),
        )
        kept_bytes, head_sum = 0, None
        if torch.is_grad_enabled():
            sums = self.gradients.sums
            head_sum = sums.head if len(sums.head) else None
            keep, kept_bytes = self.activation_budget.choose(
                micro_batch.num_tokens, len(labels), free=free_bytes(device), has_support=support is not None
            )
            hidden = _Decode.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
                self._trigger, self._decoder, weights, sums, sequences, keep
            )
        else:
            hidden, _ = self._decoder.forward(weights, sequences, None)
        count = len(labels)
        if self._invariant:
            hidden, labels = padded(hidden), padded(labels)
        log_probs, entropy = token_log_probs(
            hidden,
            weights.head,
            labels,
            temperature=temperature,
            chunk_tokens=TILE if self._invariant else self._head_chunk_tokens,
            with_entropy=with_entropy,
            weight_sum=head_sum,
            kept_bytes=kept_bytes,
            support=support,
        )
        nowhere = torch.zeros(micro_batch.num_tokens, dtype=torch.float32, device=device)
        entropy = nowhere.index_copy(0, scored, entropy[:count]) if entropy is not None else None
        return nowhere.index_copy(0, scored, log_probs[:count]), entropy


class _Decode(torch.autograd.Function):
    """The decoder as one step of autograd; gradients of weights go to their sums, and none comes back."""

    @staticmethod
    def forward(
        ctx: Any,  # torch's context object takes any attribute
        trigger: Tensor,
        decoder: PackedDecoder,
        weights: DecoderTensors,
        sums: DecoderTensors,
        sequences: Sequences,
        keep: Keep,
    ) -> Tensor:
        """Return the hidden states of the scored positions; `trigger` is what asks for a gradient."""
        hidden, forward = decoder.forward(weights, sequences, keep)
        ctx.decoder, ctx.weights, ctx.sums, ctx.forward = decoder, weights, sums, forward
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[None, ...]:
        """Run the decoder's backward, once."""
        forward: Forward = ctx.forward
        ctx.forward = None
        ctx.decoder.backward(ctx.weights, ctx.sums, forward, grad_hidden)
        return (None,) * 6


@torch.no_grad()
def _move_weights(causal_lm: PreTrainedModel, views: Mapping[str, Tensor], mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    """Copy this rank's rows of each weight into their view, and put a DTensor of all ranks' views in its place."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    given = dict(causal_lm.named_parameters())
    assert given.keys() == views.keys(), "the architecture knows every weight"
    place = mesh["dp_shard"].get_local_rank()
    moved: dict[str, nn.Parameter] = {}
    by_old: dict[nn.Parameter, nn.Parameter] = {}
    for name, view in views.items():
        view.copy_(given[name][place * len(view) : (place + 1) * len(view)])
        whole = DTensor.from_local(view, mesh, placements, run_check=False)
        moved[name] = by_old[given[name]] = nn.Parameter(whole, requires_grad=given[name].requires_grad)
    for module in causal_lm.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, by_old[parameter])  # a tied weight in both of its places
    return moved
