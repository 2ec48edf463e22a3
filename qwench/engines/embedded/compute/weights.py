"""The engine's weights: its own storage, or the trainer's live tensors, which it only reads.

Own storage is one flat buffer in the order of the engine's parameters. So q, k, v (and gate, up) lie back to back, and the
model multiplies them as one matrix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwench.engines.embedded.compute.adapters import AdapterStore
from qwench.engines.embedded.compute.ranks import Shard
from qwench.engines.protocol import Portion
from qwench.errors import EngineError, WeightSyncError
from qwench.models.architecture import Architecture
from qwench.models.fp8 import FP8_DTYPE, SCALE_DTYPE, is_quantized_name, is_scale_name, scale_name, scale_shape
from qwench.models.hf_weights import find_parameters
from qwench.models.peft import SCALE
from qwench.models.safetensors_files import read_tensor
from qwench.wire.checksum import PendingChecksums
from qwench.wire.flat_bucket import copy_all
from qwench.wire.portions import WeightBucket, bucketed

BUCKET_BYTES = 256 * 2**20
TIED_HEAD = "lm_head.weight"
WHOLE = Shard()
_ALIGNMENT_BYTES = 256
"""Matrices start at multiples of this, for cuBLAS. Neighbours are fused only if their sizes keep this alignment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parameter:
    """One tensor of the engine."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightStore:
    """Holds weights by Hugging Face name: absent, owned or aliased; `ready` when they are whole."""

    def __init__(
        self, architecture: Architecture, dtype: torch.dtype, *, fp8: bool, device: torch.device, shard: Shard = WHOLE
    ) -> None:
        """Make a store for a model, without memory for it yet.

        Args:
            architecture: of the whole model; whole weights come in.
            fp8: the layers' matrices are block-wise FP8.
            shard: the part that is held.
        """
        self._parameters = _list_parameters(architecture, dtype, fp8=fp8)
        self._held = _list_parameters(architecture.divided(shard.size), dtype, fp8=fp8)
        self._shard = shard
        self._tied_head = architecture.tied_head
        self.adapters = AdapterStore(architecture, dtype=dtype, device=device)
        """Adapters beside the weights; a publication may bring one."""
        self._device = device
        self._tensors: Mapping[str, Tensor] = {}
        self._owned = False
        self._is_whole = False
        """Every weight is here, of one publication."""
        self._matrices: dict[str, Tensor] = {}
        """Of the adapter that is being received."""
        self._received: set[str] = set()
        self._checksums = PendingChecksums()
        self._received_head = False
        self._expected = Portion(version=0, index=0, final=False)
        self.ready = False
        self.awaited = False
        """There is memory, and nothing has come in yet; see `reserve`."""
        self.layout = 0
        """Counts moves of the tensors in memory. A decoder that was bound before the last move must bind again."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Return the weights; empty while they are absent."""
        return self._tensors

    def allocate(self) -> None:
        """Take memory for own weights; they are not ready before they are copied in."""
        offsets, size_bytes = _lay_out(self._held)
        buffer = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        self._tensors = {
            name: buffer[offsets[name] : offsets[name] + parameter.num_bytes].view(parameter.dtype).view(parameter.shape)
            for name, parameter in self._held.items()
        }
        self._owned, self._is_whole, self.ready = True, False, False
        self.layout += 1

    def reserve(self) -> None:
        """Take memory for weights that a publication will bring, so that nothing else takes it."""
        self.allocate()
        self.awaited = True

    def drop(self) -> None:
        """Free own memory, or drop the references to aliased tensors."""
        self._tensors, self._owned, self._is_whole, self.ready, self.awaited = {}, False, False, False, False
        self.layout += 1

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Use live tensors as they are, without copying them.

        Raises:
            WeightSyncError: a missing or unknown name, or another shape, dtype or device than the engine's.
        """
        named = {name: tensor.detach() for name, tensor in weights.items() if not self._is_tied_copy(name)}
        self._check_complete(set(named))
        for name, tensor in named.items():
            self._check(name, tensor)
            wanted = self._parameters[name].dtype
            if tensor.dtype != wanted or tensor.device.type != self._device.type:
                raise WeightSyncError(
                    f"weight {name!r} cannot be aliased: it is {tensor.dtype} on {tensor.device}, the engine's is {wanted} "
                    f"on {self._device}; copy it by update_weights instead."
                )
        if _addresses(named) != _addresses(self._tensors):
            self.layout += 1
        self._tensors, self._owned, self._is_whole, self.ready = named, False, True, True
        self.adapters.drop_published()

    def load(self, buckets: Iterable[WeightBucket]) -> dict[str, int]:
        """Copy all weights in and return the checksum of each as it is held now.

        Raises:
            WeightSyncError: see `adopt`. Unless the very first bucket was refused, the weights are then not ready.
        """
        self.begin()
        for bucket in buckets:
            self.load_bucket(bucket)
        return self.finish()

    def take(self, bucket: WeightBucket, portion: Portion) -> dict[str, int] | None:
        """Copy one bucket of a publication in; after the final one return the checksum of each weight as it is held now.

        The sender may reuse the bucket's memory when this returns.

        Raises:
            WeightSyncError: see `load`; or a bucket before this one did not arrive.
        """
        if portion.index == 0:
            self.begin()
        elif (portion.version, portion.index) != (self._expected.version, self._expected.index):
            raise WeightSyncError(
                f"bucket {portion.index} of weight version {portion.version} arrived when bucket {self._expected.index} of "
                f"version {self._expected.version} was next; publish all weights again."
            )
        self.load_bucket(bucket)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._expected = Portion(version=portion.version, index=portion.index + 1, final=False)
        return self.finish() if portion.final else None

    def begin(self) -> None:
        """Expect all weights from now on; what is held stays in use until the first of them is here."""
        self._received, self._checksums, self._received_head = set(), PendingChecksums(), False
        self._matrices = {}

    def load_bucket(self, bucket: WeightBucket) -> None:
        """Copy some weights in; the weights are not ready again before `finish`.

        Raises:
            WeightSyncError: see `adopt`; nothing of this bucket was copied.
        """
        of_adapter = [(name, tensor) for name, tensor in bucket if is_of_adapter(name)]
        if of_adapter:
            self.ready = False
            copies = _memory_for(of_adapter, self._device)
            copy_all([copies[name] for name, _ in of_adapter], [tensor.detach() for _, tensor in of_adapter])
            self._matrices |= copies
            self._checksums.add(copies.items())
            bucket = [(name, tensor) for name, tensor in bucket if not is_of_adapter(name)]
        if bucket:
            self._load_weights(bucket)

    def _load_weights(self, bucket: WeightBucket) -> None:
        wanted = self.check_bucket(bucket)
        if not self._owned:
            # Never write into aliased tensors: they are the trainer's.
            self.allocate()
        self._is_whole = self.ready = self.awaited = False
        parts = [self._shard.cut(name, tensor.detach()) for name, tensor in wanted]
        copy_all([self._tensors[name] for name, _ in wanted], parts)
        self._received |= {name for name, _ in wanted}
        # A part has no checksum that others know: then that of the whole weight is taken as it arrived.
        self._checksums.add(wanted if self._shard.size > 1 else [(name, self._tensors[name]) for name, _ in wanted])
        self._received_head = self._received_head or len(wanted) < len(bucket)

    def check_bucket(self, bucket: WeightBucket) -> list[tuple[str, Tensor]]:
        """Return the weights of a bucket without the copy of a tied head.

        Raises:
            WeightSyncError: a name, shape or dtype that the model does not have.
        """
        wanted = [(name, tensor) for name, tensor in bucket if not self._is_tied_copy(name)]
        for name, tensor in wanted:
            self._check(name, tensor)
        return wanted

    def finish(self) -> dict[str, int]:
        """Return the checksum of each weight received since `begin`; the weights are ready.

        An adapter may come alone, for the weights that are here, or with all weights.

        Raises:
            WeightSyncError: one is missing, or the adapter does not fit.
        """
        if self._received or not self._matrices or not self._is_whole:
            self._check_complete(self._received)
        checksums = self._checksums.read()
        self._take_adapter()
        self._is_whole = self.ready = True
        if self._received_head:
            checksums[TIED_HEAD] = checksums["model.embed_tokens.weight"]
        return checksums

    def _take_adapter(self) -> None:
        if not self._matrices:
            self.adapters.drop_published()
            return
        scale = self._matrices.pop(SCALE, None)
        if scale is None or scale.numel() != 1:
            raise WeightSyncError(f"an adapter came without {SCALE!r}, the one number by which it is multiplied.")
        try:
            self.adapters.publish(self._matrices, scale=float(scale))
        except EngineError as cause:
            raise WeightSyncError(f"the adapter cannot be used: {cause}") from cause
        self._matrices = {}

    def _is_tied_copy(self, name: str) -> bool:
        return self._tied_head and name == TIED_HEAD

    def _check(self, name: str, tensor: Tensor) -> None:
        parameter = self._parameters.get(name)
        if parameter is None and is_scale_name(name):
            raise WeightSyncError(
                f"weight {name!r} is in FP8, and this engine's model is not; publish bfloat16 or float32 weights."
            )
        if parameter is None:
            raise WeightSyncError(f"the engine's model has no weight {name!r}; the trainer's model is another one.")
        if tuple(tensor.shape) != parameter.shape:
            raise WeightSyncError(
                f"weight {name!r} has shape {tuple(tensor.shape)}; the engine's model wants {parameter.shape}."
            )
        if FP8_DTYPE in (tensor.dtype, parameter.dtype) and tensor.dtype != parameter.dtype:
            raise WeightSyncError(f"weight {name!r} came as {tensor.dtype}; the engine holds it as {parameter.dtype}.")

    def _check_complete(self, received: set[str]) -> None:
        missing = [name for name in self._parameters if name not in received]
        if missing:
            listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise WeightSyncError(
                f"{len(missing)} of {len(self._parameters)} weights did not arrive: {listed}; publish all of them."
            )
        unknown = sorted(received - set(self._parameters))
        if unknown:
            raise WeightSyncError(f"the engine's model has no weight {unknown[0]!r}; the trainer's model is another one.")


def _memory_for(bucket: WeightBucket, device: torch.device) -> dict[str, Tensor]:
    """Return memory for each tensor. Those of one shape share a piece: hundreds of pieces take longer than their copies."""
    alike = defaultdict[tuple[torch.dtype, torch.Size], list[str]](list)
    for name, tensor in bucket:
        alike[tensor.dtype, tensor.shape].append(name)
    memory = dict[str, Tensor]()
    for (dtype, shape), names in alike.items():
        memory |= zip(names, torch.empty((len(names), *shape), dtype=dtype, device=device).unbind(), strict=True)
    return memory


def is_of_adapter(name: str) -> bool:
    """Tell whether a published tensor belongs to an adapter."""
    return ".lora_" in name or name == SCALE


def read_folder(folder: Path, architecture: Architecture) -> Iterator[WeightBucket]:
    """Read the weights of a Hugging Face folder in bounded buckets.

    Raises:
        ConfigError: the folder holds other weights than the model's; found before the first bucket.
        CheckpointError: its files are missing or damaged.
    """
    parameters = find_parameters(folder, architecture)
    return bucketed(((name, read_tensor(place)) for name, place in parameters.items()), bucket_bytes=BUCKET_BYTES)


def _addresses(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _list_parameters(architecture: Architecture, dtype: torch.dtype, *, fp8: bool) -> dict[str, _Parameter]:
    """Return the engine's tensors by Hugging Face name; with `fp8` the layers' matrices are e4m3 and scales come at the end."""
    shapes = architecture.parameter_shapes()
    if not fp8:
        return {name: _Parameter(shape=shape, dtype=dtype) for name, shape in shapes.items()}
    weights = {
        name: _Parameter(shape=shape, dtype=FP8_DTYPE if is_quantized_name(name) else dtype) for name, shape in shapes.items()
    }
    scales = {
        scale_name(name): _Parameter(shape=scale_shape(shape), dtype=SCALE_DTYPE)
        for name, shape in shapes.items()
        if is_quantized_name(name)
    }
    return weights | scales


def _lay_out(parameters: dict[str, _Parameter]) -> tuple[dict[str, int], int]:
    """Return where each tensor begins in one flat buffer, and how long that is, in bytes.

    Scales lie back to back without alignment, so that those of fused matrices are one matrix as well.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, parameter in parameters.items():
        alignment = SCALE_DTYPE.itemsize if is_scale_name(name) else _ALIGNMENT_BYTES
        offsets[name] = -(-end // alignment) * alignment
        end = offsets[name] + parameter.num_bytes
    return offsets, end
