"""Bytes and FLOPs of a dense decoder, by plain arithmetic on its shapes.

What a rank holds for each parameter it has, in bytes (p: of the training dtype; m: of both moments):

    FSDP2      weights 4 (they are the masters); gradients 4; moments m. One rank, or with --optimizer-cpu-offload:
               weights p; gradients 4; what the weights lack of their masters 4 - p on the device, or masters 4 on the host;
               moments m. With --whole-weights also all weights p and gradients 4 of the model
    adapters   (FSDP2) the frozen model p, as shards; weights, gradients and moments as above of the adapters alone; no
               reference. --lora-init pissa: another p of the adapters
    Megatron   weights p; gradients 4; masters and moments 4 + m, shared by the data- and context-parallel ranks. With adapters
               the frozen model p, and those of the adapters alone; --lora-init pissa as above
    reference  p, on the host, and another p of a teacher

Activations are not counted: they depend on the lengths of the samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from qwench.models.architecture import Architecture

FLOAT32_BYTES = 4
FP8_BLOCK = 128
"""Rows and columns of a block of an FP8 matrix."""
ROW_PARALLEL = ("o_proj", "down_proj")
"""Projections whose columns tensor parallelism splits; of the others it splits the rows."""
FORWARD = 1
FORWARD_AND_BACKWARD = 3
"""Passes, in units of a forward: a backward computes two products for each one."""
FORWARD_AND_FROZEN_BACKWARD = 2
"""The same of a frozen model with adapters: weights have no gradient. The adapters themselves are not counted."""
WHOLE_GRADIENT_BYTES = 4 << 30
"""FSDP2: up to this size (a billion weights) each rank keeps whole float32 gradients until the last micro-batch of the step.
Larger ones are reduced into shards after each micro-batch: more traffic, less memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceCost:
    """Forward FLOPs of one sequence of L tokens in a dense transformer: linear * L + quadratic * L^2."""

    linear: float
    """FLOPs per token of all matrix products but attention's: 2 for each weight."""
    quadratic: float
    """FLOPs per pair of tokens of causal attention, scores and values."""
    head: float = 0.0
    """FLOPs per token of the output layer alone, which `linear` has in it."""

    @classmethod
    def of_model(cls, model: Architecture) -> SequenceCost:
        """Count the FLOPs of a model."""
        matrices = sum(prod(shape) for shape in model.layer_shapes().values() if len(shape) > 1)
        head = model.hidden_size * model.vocab_size
        return cls(
            linear=2.0 * (model.num_layers * matrices + head),
            # Two products of 2 * head_dim FLOPs for each pair and head; half of the pairs are causal.
            quadratic=2.0 * model.num_layers * model.num_heads * model.head_dim,
            head=2.0 * head,
        )

    def of(self, length: int) -> float:
        """Return the FLOPs of `length` tokens."""
        return self.linear * length + self.quadratic * length * length


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Bytes of one element of each kind, and the place of optimizer states."""

    param: int
    """Of the training dtype."""
    moments: float
    """Of both together, on average."""
    offloaded: float
    """Share of masters and moments on the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBytes:
    """Bytes that one trainer rank holds between steps; gradients during a step."""

    weights: int
    gradients: int
    optimizer: int
    """Masters and moments on the device."""
    host_optimizer: int
    host_reference: int

    @property
    def device(self) -> int:
        """Return the bytes on the device during a step, without activations."""
        return self.weights + self.gradients + self.optimizer

    @property
    def host(self) -> int:
        """Return the bytes on the host."""
        return self.host_optimizer + self.host_reference


def num_parameters(model: Architecture) -> int:
    """Count the parameters; tied embeddings count once."""
    return _count(model.parameter_shapes().values())


def fp8_bytes(model: Architecture, *, element_bytes: int) -> int:
    """Return the bytes of a model whose layers' matrices are FP8, one scale for each block (`models.fp8`)."""
    blocks = model.num_layers * sum(
        -(-shape[0] // FP8_BLOCK) * -(-shape[1] // FP8_BLOCK) for shape in model.layer_shapes().values() if len(shape) == 2
    )
    matrices = model.num_layers * sum(prod(shape) for shape in model.layer_shapes().values() if len(shape) == 2)
    return matrices + FLOAT32_BYTES * blocks + element_bytes * (num_parameters(model) - matrices)


def num_adapter_parameters(
    model: Architecture, targets: Iterable[str], rank: int, *, num_layers: int | None = None, tp: int = 1
) -> int:
    """Count the parameters of adapters at the named projections.

    Args:
        num_layers: Layers that are counted. None: every layer.
        tp: Tensor-parallel ranks. One rank has its columns of A or its rows of B, and the whole other matrix.
    """
    shapes = projection_shapes(model)
    split = {target: 1 if target in ROW_PARALLEL else 0 for target in targets}
    sides = (shapes[target][dim] // tp + shapes[target][1 - dim] for target, dim in split.items())
    return (model.num_layers if num_layers is None else num_layers) * rank * sum(sides)


def projection_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the rows and columns of each projection of a layer by its name, as in q_proj."""
    shapes = model.layer_shapes()
    return {name.split(".")[-2]: shape for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1}


def kv_bytes_per_token(model: Architecture, *, element_bytes: int = 2) -> int:
    """Return the bytes that keys and values of one token take over all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * element_bytes


def fsdp_bytes(
    model: Architecture, state: StateBytes, *, num_shards: int, holds_reference: bool, computes_whole: bool = False
) -> RankBytes:
    """Return what an FSDP2 rank holds when `num_shards` ranks share one copy of the model.

    Args:
        computes_whole: Each rank also has the whole weights that it computes with, and whole gradients.
    """
    whole = num_parameters(model)
    owned = -(-whole // num_shards)
    weights = state.param if state.offloaded or num_shards == 1 else FLOAT32_BYTES
    computes_whole = computes_whole and num_shards > 1
    keeps_whole_gradient = computes_whole or whole * FLOAT32_BYTES <= WHOLE_GRADIENT_BYTES
    return RankBytes(
        weights=owned * weights + (whole * state.param if computes_whole else 0),
        gradients=(whole if keeps_whole_gradient else owned) * FLOAT32_BYTES,
        optimizer=round(owned * (FLOAT32_BYTES - weights + state.moments) * (1 - state.offloaded)),
        host_optimizer=round(owned * (FLOAT32_BYTES + state.moments) * state.offloaded),
        host_reference=owned * state.param if holds_reference else 0,
    )


def adapter_bytes(
    model: Architecture,
    state: StateBytes,
    *,
    num_shards: int,
    num_trained: int,
    keeps_start: bool,
    holds_reference: bool,
    num_quantised: int = 0,
    quantised: float = 0.0,
) -> RankBytes:
    """Return what an FSDP2 rank holds of a frozen model and its adapters.

    Args:
        num_trained: Parameters of the adapters.
        keeps_start: The start of the adapters is held too, and subtracted.
        holds_reference: A teacher waits on the host for the places of the frozen model.
        num_quantised: Frozen parameters in fewer bits, which each rank holds whole. quantised: Bytes of one.
    """
    owned, trained = -(-(num_parameters(model) - num_quantised) // num_shards), -(-num_trained // num_shards)
    weights = state.param if state.offloaded else FLOAT32_BYTES
    return RankBytes(
        weights=owned * state.param
        + round(num_quantised * quantised)
        + trained * (weights + (state.param if keeps_start else 0)),
        gradients=(num_trained if num_trained * FLOAT32_BYTES <= WHOLE_GRADIENT_BYTES else trained) * FLOAT32_BYTES,
        optimizer=round(trained * (FLOAT32_BYTES - weights + state.moments) * (1 - state.offloaded)),
        host_optimizer=round(trained * (FLOAT32_BYTES + state.moments) * state.offloaded),
        host_reference=(owned + num_quantised) * state.param if holds_reference else 0,
    )


def megatron_bytes(
    model: Architecture,
    state: StateBytes,
    *,
    tp: int,
    pp: int,
    num_replicas: int,
    holds_reference: bool,
    stage_layers: int | None = None,
    num_adapted: int | None = None,
    keeps_start: bool = False,
    num_quantised: int = 0,
    quantised: float = 0.0,
) -> RankBytes:
    """Return what a rank of Megatron's largest stage holds; `num_replicas` (data x context parallel) share its states.

    Args:
        stage_layers: layers of the largest stage. None: all stages have as many.
        num_adapted: parameters of the rank's adapters, beside a frozen model. None: all weights are trained.
        keeps_start: the start of the adapters is held too, and subtracted.
        num_quantised: the rank's frozen parameters in fewer bits. quantised: bytes of one.
    """
    layer = sum(prod(shape) // (tp if len(shape) > 1 else 1) for shape in model.layer_shapes().values())
    embedding = -(-model.vocab_size // tp) * model.hidden_size
    held = (
        (stage_layers or model.num_layers // pp) * layer
        + embedding * (2 if pp == 1 and not model.tied_head else 1)
        + model.hidden_size
    )
    trained = held if num_adapted is None else num_adapted
    owned = -(-trained // num_replicas)
    masters = FLOAT32_BYTES if state.param != FLOAT32_BYTES else 0
    return RankBytes(
        weights=(held - num_quantised + (num_adapted or 0) * (2 if keeps_start else 1)) * state.param
        + round(num_quantised * quantised),
        gradients=trained * FLOAT32_BYTES,
        optimizer=round(owned * (masters + state.moments) * (1 - state.offloaded)),
        host_optimizer=round(owned * (FLOAT32_BYTES + state.moments) * state.offloaded),
        host_reference=held * state.param if holds_reference else 0,
    )


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(prod, shapes))


def gib(num_bytes: float) -> str:
    """Write bytes in GiB with three digits, without the unit."""
    size = num_bytes / 2**30
    return f"{size:.3g}" if size < 1000 else f"{size:.0f}"
