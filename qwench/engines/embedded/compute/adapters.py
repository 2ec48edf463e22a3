"""LoRA adapters beside the engine's weights: many at once, and rows of different ones in one batch.

    x [T, K] --A of all adapters, one product--> [T, n, S, R] --times mix [T, S]--> --B of all adapters--> added to y [T, N]

n projections share an input, S adapters are stacked, R is the largest rank. `mix` has a token's own adapter at its scale and
zeros for the others. So a token without an adapter gets the base model's output, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwench.engines.embedded.scheduling.request import NO_ADAPTER, ChosenAdapter, RunningRequest
from qwench.errors import EngineError
from qwench.models.architecture import Architecture
from qwench.models.decoder.linear import Projection
from qwench.models.peft import A, AdapterFolder, B
from qwench.wire.flat_bucket import copy_all

PUBLISHED = ""
"""The adapter that publications bring: requests that name no other compute with it."""
_PUBLISHED_SLOT = 1
_LARGEST_INPUT = 2.0**20
"""More than a projection of a trained model reads."""
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections of a layer that read the same input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStack:
    """The matrices of all adapters at projections that share an input."""

    a: Tensor
    """[n, S, R, K]"""
    b: Sequence[Tensor]
    """Of each projection, [N, S, R]: of one adapter alone it lies as the adapter's own matrix."""

    def add(self, x: Tensor, outputs: Sequence[Tensor], mix: Tensor) -> None:
        """Add every token's adapter to the projections' outputs [T, N], in place."""
        reduced = torch.nn.functional.linear(x, self.a.flatten(0, 2)).view(len(x), len(self.b), mix.shape[1], -1)
        reduced = reduced * mix[:, None, :, None]
        for index, (output, b) in enumerate(zip(outputs, self.b, strict=True)):
            output.addmm_(reduced[:, index].flatten(1), b.flatten(1).T)

    def keep(self, before: AdapterStack) -> None:
        """Copy the matrices of a stack with fewer adapters or smaller ranks in."""
        for new, old in zip((self.a, *self.b), (before.a, *before.b), strict=True):
            new[:, : old.shape[1], : old.shape[2]].copy_(old)


class AdaptedProjection:
    """A projection of a layer, and the adapters at it."""

    def __init__(self, base: Projection, stack: AdapterStack | None) -> None:
        self._base = base
        self._stack = stack

    def __call__(self, x: Tensor, mix: Tensor | None) -> tuple[Tensor, ...]:
        """Return x [T, K] times each matrix; `mix` is None where no token has an adapter."""
        outputs = self._base(x)
        if self._stack is not None and mix is not None:
            self._stack.add(x, outputs, mix)
        return outputs


class AdapterStore:
    """Adapters by name. The engine changes it between two steps only."""

    def __init__(self, architecture: Architecture, *, dtype: torch.dtype, device: torch.device) -> None:
        self._shapes = {
            name.removesuffix(".weight"): shape
            for name, shape in architecture.parameter_shapes().items()
            if name.endswith("_proj.weight")
        }
        self._dtype, self._device = dtype, device
        self._chosen: dict[str, ChosenAdapter] = {}
        self._num_slots = self._rank = 0
        self._stacks: dict[tuple[str, ...], AdapterStack] = {}
        """By the projections that share an input, where an adapter has one of them."""
        self._places: dict[tuple[int, int], Mapping[str, Tensor]] = {}
        """Of the matrices of an adapter, by its slot and rank."""
        self._mixes = torch.zeros((1, 0), dtype=dtype, device=device)
        self._num_loads = 0
        self.layout = 0
        """Counts moves of the matrices in memory."""

    @property
    def folders(self) -> Mapping[str, str]:
        """Return the folders of the adapters that requests may name, in the order of their loads."""
        return {name: chosen.folder for name, chosen in list(self._chosen.items()) if name != PUBLISHED}

    @property
    def is_empty(self) -> bool:
        """Tell whether no adapter was ever loaded."""
        return self._num_slots == 0

    def choose(self, name: str | None) -> ChosenAdapter:
        """Return the adapter of a request that names it; None: the published one, or none.

        Raises:
            EngineError: it is not loaded.
        """
        if name is None:
            return self._chosen.get(PUBLISHED, NO_ADAPTER)
        if name not in self.folders:
            raise EngineError(f"there is no adapter {name!r}; loaded: {', '.join(self.folders) or 'none'}.")
        return self._chosen[name]

    def mix(self, slots: Tensor) -> Tensor:
        """Return [T, S]: the scale of each token's adapter at its place, else 0."""
        return self._mixes.index_select(0, slots)

    def add(
        self, name: str, matrices: Mapping[str, Tensor], *, scale: float, in_use: set[int], folder: Path | None = None
    ) -> None:
        """Copy an adapter in under a new name.

        Args:
            matrices: A [r, K] and B [N, r] by `<module>.lora_A.weight` and `<module>.lora_B.weight`.
            in_use: Slots of unfinished requests, whose adapters stay.
            folder: Where it was read, for those who ask what is loaded.

        Raises:
            EngineError: the name is empty or taken, or the adapter cannot be used. Nothing was changed.
        """
        if not name or name in self._chosen:
            raise EngineError(f"adapter {name!r} is loaded; unload it first." if name else "an adapter needs a name.")
        taken = in_use | {_PUBLISHED_SLOT} | {chosen.slot for chosen in self._chosen.values()}
        slot = next(slot for slot in range(1, len(taken) + 2) if slot not in taken)
        self._load(name, matrices, scale, slot=slot, folder=str(folder or ""))

    def publish(self, matrices: Mapping[str, Tensor], *, scale: float) -> None:
        """Copy the adapter of a publication in, in the place of the one before it.

        Raises:
            EngineError: it cannot be used. Nothing was changed.
        """
        self._load(PUBLISHED, matrices, scale, slot=_PUBLISHED_SLOT)

    def drop_published(self) -> None:
        """Forget the adapter of an earlier publication, if there is one."""
        self._chosen.pop(PUBLISHED, None)

    @torch.inference_mode()
    def _load(self, name: str, matrices: Mapping[str, Tensor], scale: float, *, slot: int, folder: str = "") -> None:
        modules = sorted({matrix.rpartition(".lora_")[0] for matrix in matrices})
        rank = self._check(name, modules, matrices)
        self._check_numbers(name, matrices, scale)
        try:
            self._make_room(modules, rank=max(rank, self._rank), num_slots=max(slot, self._num_slots))
        except torch.OutOfMemoryError as cause:
            raise EngineError(f"the device has no memory for adapter {name!r} of rank {rank}; unload another one.") from cause
        places = self._places_of(slot, rank)
        if rank < self._rank or len(matrices) < len(places):
            for stack in self._stacks.values():
                for stacked in (stack.a, *stack.b):
                    stacked[:, slot - 1].zero_()
        copy_all([places[matrix] for matrix in matrices], list(matrices.values()))
        self._mixes[slot, slot - 1] = scale
        self._num_loads += 1
        self._chosen[name] = ChosenAdapter(slot=slot, cache_root=-self._num_loads, folder=folder)

    def _places_of(self, slot: int, rank: int) -> Mapping[str, Tensor]:
        """Return where the matrices of an adapter lie; kept, because hundreds of views take longer than the copies."""
        if (slot, rank) not in self._places:
            self._places[slot, rank] = {
                f"{module}.{leaf}": stacked[slot - 1, :rank] if leaf == A else stacked[:, slot - 1, :rank]
                for group, stack in self._stacks.items()
                for module, a, b in zip(group, stack.a, stack.b, strict=True)
                for leaf, stacked in ((A, a), (B, b))
            }
        return self._places[slot, rank]

    def unload(self, name: str) -> None:
        """Forget an adapter; unfinished requests go on with it.

        Raises:
            EngineError: it is not loaded.
        """
        self.choose(name)
        del self._chosen[name]

    def stack(self, modules: Sequence[str]) -> AdapterStack | None:
        """Return the matrices at projections that share an input; None: no adapter has any there."""
        return self._stacks.get(tuple(modules))

    def _check(self, name: str, modules: Sequence[str], matrices: Mapping[str, Tensor]) -> int:
        """Return the rank.

        Raises:
            EngineError: it has no matrices, or not those of projections of the model.
        """
        ranks = {matrix.shape[:1] for matrix_name, matrix in matrices.items() if matrix_name.endswith(A)}
        if len(ranks) != 1 or not (rank := math.prod(ranks.pop())):
            raise EngineError(f"adapter {name!r} has no matrices of one rank.")
        for module in modules:
            if module not in self._shapes:
                raise EngineError(f"adapter {name!r} does not fit the engine's model, which has no projection {module!r}.")
            rows, columns = self._shapes[module]
            for leaf, shape in ((A, (rank, columns)), (B, (rows, rank))):
                found = matrices.get(f"{module}.{leaf}")
                if found is None or tuple(found.shape) != shape:
                    raise EngineError(f"adapter {name!r} does not fit the engine's model: {module}.{leaf} is not {shape}.")
        return rank

    def _check_numbers(self, name: str, matrices: Mapping[str, Tensor], scale: float) -> None:
        """Refuse what is not finite in the engine's dtype: times the zeros of `mix` it would reach every token of a batch.

        So would a product A x that overflows for a token of another adapter.

        Raises:
            EngineError: a number is not finite, or A so large that A x may overflow.
        """
        largest = torch.stack(torch._foreach_norm([matrix.to(self._dtype) for matrix in matrices.values()], ord=math.inf))
        finite = largest.isfinite()
        if not abs(scale) <= torch.finfo(self._dtype).max:
            raise EngineError(f"adapter {name!r} is multiplied by {scale:g}, which is no number of {self._dtype}.")
        if not finite.all():
            broken = next(compress(matrices, finite.logical_not().tolist()))
            raise EngineError(f"adapter {name!r} holds numbers that are not finite in {self._dtype}, in {broken}.")
        for (matrix, held), number in zip(matrices.items(), largest.tolist(), strict=True):
            if matrix.endswith(A) and number * held.shape[1] * _LARGEST_INPUT > torch.finfo(self._dtype).max:
                raise EngineError(f"adapter {name!r} holds {number:g} in {matrix}: the product with a token overflows.")

    def _make_room(self, modules: Sequence[str], *, rank: int, num_slots: int) -> None:
        """Grow the stacks, which moves them; new places are zero. Without memory for them, nothing is changed."""
        groups = dict.fromkeys((*self._stacks, *map(_sharing_input, modules)))
        if (rank, num_slots) == (self._rank, self._num_slots) and len(groups) == len(self._stacks):
            return
        grown = {group: self._zeros(group, rank=rank, num_slots=num_slots) for group in groups}
        for group, before in self._stacks.items():
            grown[group].keep(before)
        mixes = torch.zeros((num_slots + 1, num_slots), dtype=self._dtype, device=self._device)
        mixes[: self._mixes.shape[0], : self._mixes.shape[1]] = self._mixes
        self._stacks, self._mixes, self._rank, self._num_slots, self._places = grown, mixes, rank, num_slots, {}
        self.layout += 1

    def _zeros(self, group: Sequence[str], *, rank: int, num_slots: int) -> AdapterStack:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self._dtype, device=self._device)

        a = zeros(len(group), num_slots, rank, self._shapes[group[0]][1])
        return AdapterStack(a=a, b=[zeros(self._shapes[module][0], num_slots, rank) for module in group])


def _sharing_input(module: str) -> tuple[str, ...]:
    """Return the projections that read the input of `module`, itself included, in the order of the layer."""
    parent, _, leaf = module.rpartition(".")
    return next(tuple(f"{parent}.{name}" for name in names) for names in _SHARED_INPUTS if leaf in names)


AdapterChange = Callable[[AdapterStore, set[int]], None]
"""Loads or unloads adapters; gets the slots of unfinished requests too."""


def load_folder(name: str, folder: Path, model: Architecture) -> AdapterChange:
    """Read a folder, and return what adds it to an engine's adapters (see `EmbeddedEngine.change_adapters`).

    Raises:
        ConfigError: it is no LoRA adapter, or one of another model.
        CheckpointError: its weights are missing or damaged.
    """
    stored = AdapterFolder(folder)
    stored.check_fits(model)
    matrices = {name: stored.read(name) for name in stored.config.shapes(model)}
    return lambda adapters, in_use: adapters.add(name, matrices, scale=stored.config.scale, in_use=in_use, folder=folder)


class RowAdapters:
    """Which adapter each row of the scheduler's table computes with; the last row, for padding, has none."""

    def __init__(self, store: AdapterStore, num_rows: int, device: torch.device) -> None:
        self.store = store
        self._host = np.zeros(num_rows, dtype=np.int32)
        self._slots = torch.zeros(num_rows, dtype=torch.int32, device=device)

    def seat(self, requests: Iterable[RunningRequest]) -> bool:
        """Note the adapters of a step's requests; tell whether any has one."""
        if self.store.is_empty:
            return False
        seated = [(request.row, request.adapter.slot) for request in requests]
        changed = [(row, slot) for row, slot in seated if self._host[row] != slot]
        for row, slot in changed:
            self._host[row] = slot
        if changed:
            self._slots.copy_(torch.from_numpy(self._host))
        return any(slot for _, slot in seated)

    def mix(self, rows: Tensor) -> Tensor:
        """See `AdapterStore.mix`, of the tokens of these rows."""
        return self.store.mix(self._slots.index_select(0, rows))
