"""Adapters beside megatron-core's parallel linear layers. Each projection has its own A and B, as PEFT has them.

    linear_qkv, linear_fc1     x --A, whole--> --gather tokens, or copy--> --B, rows of this rank--> added to the output
    linear_proj, linear_fc2    x of this rank's columns --A, columns--> --sum over tp--> --B, whole--> added to the output

The layers themselves are frozen: megatron-core gives them no gradient buffer, and the optimizer no master and no moments. The
projections of one layer share one product by A and one collective, of rank numbers a token. With --lora-init pissa, a start of
as many matrices is computed in the same way, and subtracted (`training.pissa`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn
from torch.nn import functional

from qwench.checkpoints.folders import starting_adapter
from qwench.checkpoints.formats.sources import TensorReader
from qwench.config.sections.lora import LoraConfig
from qwench.models.architecture import Architecture
from qwench.models.megatron_names import WeightRule, rules, tp_shard
from qwench.models.memory import projection_shapes
from qwench.models.peft import SCALE, A, AdapterConfig, B, merged
from qwench.training.adapters import AdapterSwitch, random_a
from qwench.training.megatron.model import PolicyModel, local_parameters
from qwench.training.megatron.quantised_linear import QuantisedLinear, join
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.megatron.weights import WholeWeights
from qwench.training.pissa import as_one, folder_name, is_start, merged_change, part_of, principal, start_of


class LayerAdapters(nn.Module):
    """The adapters of one parallel linear layer, whose output they change."""

    def __init__(
        self,
        layer: Any,  # a ColumnParallelLinear or RowParallelLinear, which have no types, or a QuantisedLinear
        rule: WeightRule,
        place: TensorPlace,
        section: LoraConfig,
        switch: AdapterSwitch,
        *,
        index: int,
        like: Tensor,
    ) -> None:
        """Allocate A and B, and add the adapters to what `layer` returns from now on.

        Args:
            rule: Of the layer's weight.
            index: Of the layer among all that have adapters; of a sharded input another one on each rank.
            like: The layer's weight, for dtype and device.
        """
        super().__init__()
        self._is_row = rule.tp_dim == 1
        self._is_split: bool = layer.sequence_parallel
        self._kind, self._scale = rule.kind, section.scale
        self._groups = place.model.num_kv_heads // place.tp_size
        self._switch, self._index = switch, index
        self._shapes = {name.split(".")[-2]: _local_shape(name, place, tp_dim=rule.tp_dim) for name in rule.hf_names}
        """Of each projection on this rank, in the order of the layer."""
        self._rank = section.rank
        self.weights: list[tuple[WeightRule, nn.Parameter]] = []
        self.starts: list[tuple[WeightRule, nn.Parameter]] = []
        self._a, self._b = nn.ParameterDict(), nn.ParameterDict()
        self._start_a, self._start_b = nn.ParameterDict(), nn.ParameterDict()
        for name in rule.hf_names:
            for one in _rules_of(rule, name, section):
                self._allocate(one, name.split(".")[-2], like=like)
        layer.add_module("adapters", self)
        layer.register_forward_hook(self._add)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output, for its input [t, 1, D]."""
        x = self._switch.dropped(x, self._index)
        delta = self._products(x, self._a, self._b)
        if self._start_a:
            # The same products in the same order: at the start the difference is exactly zero.
            delta = delta - self._products(x, self._start_a, self._start_b)
        return self._scale * delta

    def _products(self, x: Tensor, tops: nn.ParameterDict, bottoms: nn.ParameterDict) -> Tensor:
        """Return B (A x) of the projections, for this rank's A and B by projection."""
        reduced = functional.linear(x, torch.cat(tuple(tops.values())))
        if self._is_row and self._is_split:
            reduced = reduce_scatter_to_sequence_parallel_region(reduced)
        elif self._is_row:
            reduced = reduce_from_tensor_model_parallel_region(reduced)
        elif self._is_split:
            reduced = gather_from_sequence_parallel_region(reduced, tensor_parallel_output_grad=True)
        else:
            reduced = copy_to_tensor_model_parallel_region(reduced)
        return self._joined(dict(zip(bottoms, reduced.split(self._rank, dim=-1), strict=True)), bottoms)

    def _joined(self, reduced: dict[str, Tensor], bottoms: nn.ParameterDict) -> Tensor:
        """Return the projections' outputs in the order of the layer's; zeros where a projection has no adapter."""
        any_one = next(iter(reduced.values()))
        parts = [
            functional.linear(reduced[name], bottoms[name])
            if name in reduced
            else any_one.new_zeros((*any_one.shape[:-1], rows))
            for name, (rows, _columns) in self._shapes.items()
        ]
        return join(parts, kind=self._kind, groups=self._groups)

    def _add(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> object:
        """Be the hook of the layer."""
        if not self._switch.is_on:
            return output
        return output[0] + self(inputs[0]), output[1]

    def _allocate(self, rule: WeightRule, projection: str, *, like: Tensor) -> None:
        """Allocate a matrix of zeros, and mark it as megatron-core marks weights."""
        is_a, trained = folder_name(rule.megatron_name).endswith(A), not is_start(rule.megatron_name)
        rows, columns = self._shapes[projection]
        shape = (self._rank, columns) if is_a else (rows, self._rank)
        matrix = nn.Parameter(like.new_zeros(shape), requires_grad=trained)
        if rule.tp_dim is not None:
            set_tensor_model_parallel_attributes(matrix, True, rule.tp_dim, 1)
        # With sequence parallelism a rank has the gradient of its own tokens; megatron-core sums those of marked weights.
        matrix.sequence_parallel = self._is_split and rule.tp_dim is None  # type: ignore[attr-defined]
        (self.weights if trained else self.starts).append((rule, matrix))
        tops, bottoms = (self._a, self._b) if trained else (self._start_a, self._start_b)
        (tops if is_a else bottoms)[projection] = matrix


class Adapters:
    """All adapters of this rank's stage."""

    def __init__(
        self, model: PolicyModel, place: TensorPlace, section: LoraConfig, *, source: TensorReader, seed: int, base: str
    ) -> None:
        """Freeze `model`, and give each target its adapter; collective.

        Args:
            source: Of the model's weights.
            seed: Of what is random: the start, and what passes drop.
            base: Folder of the model, which adapter folders name.
        """
        self.section, self.place, self._base = section, place, base
        self.switch = AdapterSwitch(section.lora_dropout, seed=seed)
        """Decides what the adapters do in a pass."""
        self.start_folder = starting_adapter(section)
        """PEFT folder that a fresh run begins with. None: A is random, B zero."""
        model.requires_grad_(False)
        layers = {
            module.weight: (name, module)
            for name, module in model.named_modules()
            if isinstance(module, ColumnParallelLinear | RowParallelLinear)
        }
        self.rules = list(adapter_rules(place.model, section))
        """Of every stage's matrices, in the order of the model."""
        self.weights: list[tuple[WeightRule, nn.Parameter]] = []
        """This stage's matrices that are trained."""
        self.starts: list[tuple[WeightRule, nn.Parameter]] = []
        """This stage's matrices that are subtracted."""
        self.quantised: list[tuple[WeightRule, QuantisedLinear]] = []
        """This stage's frozen weights that are held in fewer bits."""
        for index, (rule, weight) in enumerate(local_parameters(model, place.model)):
            if any(True for name in rule.hf_names for _ in _rules_of(rule, name, section)):
                name, layer = layers[weight]
                if section.lora_base != "auto":
                    layer = QuantisedLinear(layer, rule, place, section)
                    model.set_submodule(name, layer)
                    self.quantised.append((rule, layer))
                number = index + (place.tp_rank << 12 if rule.tp_dim == 1 or layer.sequence_parallel else 0)
                adapters = LayerAdapters(layer, rule, place, section, self.switch, index=number, like=weight)
                self.weights += adapters.weights
                self.starts += adapters.starts
        granularity, modules = model.config.recompute_granularity, model.config.recompute_modules
        if model.pre_process and (granularity == "full" or (granularity == "selective" and "mlp" in modules)):
            model.embedding.register_forward_hook(_require_gradient)
        if section.lora_init == "pissa":
            self._start_principal(source)
        else:
            self._start_random(seed)
        self._whole = WholeWeights([*self.weights, *self.starts], self.rules, place.model)

    def config(self) -> AdapterConfig:
        """Return what an adapter folder of this run says."""
        return AdapterConfig.of_run(self.section, base=self._base)

    def held(self) -> list[tuple[WeightRule, Tensor]]:
        """Return this stage's matrices as a forward computes with them."""
        return [(rule, weight.detach()) for rule, weight in self.weights]

    def fill(self, source: TensorReader) -> None:
        """Copy this rank's share of an adapter's matrices."""
        for rule, weight in (*self.weights, *self.starts):
            weight.data.copy_(self.share(rule, source))

    def share(self, rule: WeightRule, source: TensorReader) -> Tensor:
        """Return this rank's share of one matrix of an adapter folder."""
        name = rule.hf_names[0]
        stored = source.read(folder_name(name))
        return self._share(rule, part_of(name, stored) if self.starts else stored)

    def _share(self, rule: WeightRule, whole: Tensor) -> Tensor:
        return tp_shard(rule, whole, self.place.tp_rank, self.place.tp_size)

    def merged_into(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield whole weights of the model with their adapters merged; collective."""
        matrices = dict(self._whole.gather())
        for name, weight in weights:
            module = name.removesuffix(".weight")
            if f"{module}.{A}" not in matrices:
                yield name, weight
                continue
            names = [f"{module}.{A}", f"{module}.{B}"]
            a, b, *start = (matrices[one] for one in (*names, *map(start_of, names)) if one in matrices)
            scale = self.section.scale
            yield name, merged_change(weight, a, b, *start, scale=scale) if start else merged(weight, a, b, scale=scale)

    def apart(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the matrices of the adapter, whole, and its scale; collective."""
        yield from as_one(dict(self._whole.gather())).items()
        yield SCALE, torch.tensor([self.section.scale], device=self.weights[0][1].device)

    def _start_random(self, seed: int) -> None:
        """Fill A with random numbers; B is zero."""
        shapes = self.config().shapes(self.place.model)
        for rule, weight in self.weights:
            if (name := rule.hf_names[0]).endswith(A):
                weight.data.copy_(self._share(rule, random_a(name, shapes[name], seed=seed)))

    def _start_principal(self, source: TensorReader) -> None:
        """Fill matrices and starts with principal components, which one rank of each stage computes; collective."""
        groups = (
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        computes = all(group.rank() == 0 for group in groups)
        held = {rule.megatron_name: (rule, weight) for rule, weight in (*self.weights, *self.starts)}
        for rule, weight in self.weights:
            if not (top := rule.megatron_name).endswith(A):
                continue
            module = top.removesuffix(f".{A}")
            rows, columns = projection_shapes(self.place.model)[module.rsplit(".", 1)[-1]]
            whole = [
                weight.new_empty(shape, dtype=torch.float32)
                for shape in ((self.section.rank, columns), (rows, self.section.rank))
            ]
            if computes:
                # As rounded to the dtype of a forward, which the model computes with.
                rounded = source.read(f"{module}.weight").to(weight).float()
                whole = list(principal(rounded, self.section, weight.dtype))
            for leaf, matrix in zip((A, B), whole, strict=True):
                for group in groups:  # from the first tensor-parallel rank to the others, then from the first replica
                    dist.broadcast(matrix, src=dist.get_global_rank(group, 0), group=group)
                for name in (f"{module}.{leaf}", start_of(f"{module}.{leaf}")):
                    own, share = held[name]
                    share.data.copy_(self._share(own, matrix))


def adapter_rules(model: Architecture, section: LoraConfig) -> Iterator[WeightRule]:
    """Yield a rule for every matrix of every adapter, in the order of the layers."""
    for rule in rules(model):
        for name in rule.hf_names:
            yield from _rules_of(rule, name, section)


def _rules_of(rule: WeightRule, name: str, section: LoraConfig) -> Iterator[WeightRule]:
    """Yield the rules of the matrices of a projection, the Hugging Face weight `name` of a layer's; of no target, none."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or module.rsplit(".", 1)[-1] not in section.targets:
        return
    for matrix, tp_dim in ((A, 1), (B, 0)):
        full = f"{module}.{matrix}"
        split = tp_dim if rule.tp_dim == tp_dim else None
        for one in (full, start_of(full)) if section.lora_init == "pissa" else (full,):
            yield WeightRule(megatron_name=one, hf_names=(one,), checkpoint_key=one, tp_dim=split)


def _local_shape(name: str, place: TensorPlace, *, tp_dim: int | None) -> list[int]:
    """Return rows and columns of a projection on this rank."""
    shape = list(projection_shapes(place.model)[name.split(".")[-2]])
    if tp_dim is not None:
        shape[tp_dim] //= place.tp_size
    return shape


def _require_gradient(_embedding: nn.Module, _inputs: object, embedded: Tensor) -> Any:  # torch's signature of a hook
    """Mark the input of the first layer: a recomputed layer without an input that needs a gradient would have none itself."""
    return embedded.requires_grad_() if torch.is_grad_enabled() else embedded
