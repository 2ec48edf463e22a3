"""Checkpoints of the torch_dist format, which any layout can read, and checkpoints of other formats.

    folder/.metadata, __*_*.distcp   weights under Megatron's keys, masters and moments under `optimizer.state.*`
    folder/metadata.json             says that it is torch_dist
    folder/common.pt                 what is no tensor: step count, parameter groups
    folder/rng.pt                    generators of the host and the devices, by the main rank

Each rank writes the rectangles it owns (`tensor_place`) with torch.distributed.checkpoint: megatron-core's writer starts
processes, and its versions store other objects in different files. megatron-core reads what is written here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwench.checkpoints.formats.dcp_reader import DcpFolder
from qwench.checkpoints.formats.pieces import Piece, PiecedTensor
from qwench.checkpoints.formats.sources import MOMENTUM, OptimizerState, find_format
from qwench.checkpoints.formats.torch_dist import (
    MOMENTUM_PREFIX,
    extra_states,
    holds,
    read_num_steps,
    write_common_files,
)
from qwench.errors import ConfigError
from qwench.models.megatron_names import WeightRule, to_megatron, tp_shard
from qwench.training.megatron.optimizer import MasterOptimizer
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.optimizers.host_adam import MASTER, MOMENTS
from qwench.training.resuming import load_in_place, save_tensors

_STATE_KEYS = {MASTER: "optimizer.state.param."} | {name: f"optimizer.state.{name}." for name in (*MOMENTS, MOMENTUM)}
"""Where Megatron's `fully_reshardable` optimizer state is stored, before the key of the weight."""
NamedWeights = Sequence[tuple[WeightRule, nn.Parameter]]


def save(folder: Path, weights: NamedWeights, optimizer: MasterOptimizer | None, place: TensorPlace, *, is_main: bool) -> None:
    """Write weights and, where given, optimizer; collective. A weight that two stages hold is given by one of them."""
    tensors: dict[str, object] = dict(_weight_tensors(weights, place))
    if optimizer is not None:
        tensors |= _state_tensors(weights, optimizer, place)
    if is_main:
        tensors |= {key: [None] for key in extra_states(place.model)}
    save_tensors(folder, tensors, flat_keys=False)
    if not is_main:
        return
    if optimizer is None:
        write_common_files(folder, num_steps=None)
    else:
        steps, groups = optimizer.num_steps, optimizer.group_constants()
        write_common_files(folder, num_steps=steps, iteration=steps, groups=groups)


def is_stored_alike(folder: Path, weights: NamedWeights, place: TensorPlace) -> bool:
    """Tell whether `folder` is torch_dist with tensors of just these keys and shapes, to be read in place; collective.

    Others have to be converted: FSDP's, Hugging Face's, a padded vocabulary, layers stored one by one.
    """
    if find_format(folder) != "torch_dist":
        return False
    stored = DcpFolder(folder).tensors
    held = _weight_tensors(weights, place)
    alike = all(key in stored and stored[key].shape == tensor.shape for key, tensor in held.items())
    # A stage in the middle holds no vocabulary, but reading in place is collective: all ranks go the same way.
    everywhere = torch.tensor(float(alike), device=weights[0][1].device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)


def load_weights(folder: Path, weights: NamedWeights, place: TensorPlace) -> None:
    """Read the weights in place; collective."""
    load_in_place(folder, _weight_tensors(weights, place))


def load_state(folder: Path, weights: NamedWeights, optimizer: MasterOptimizer, place: TensorPlace) -> None:
    """Read masters and moments in place, however they were sharded; collective."""
    load_in_place(folder, _state_tensors(weights, optimizer, place))


def steps_of_muon(folder: Path, *, is_stored_alike: bool) -> int:
    """Return how many steps Muon has taken.

    Raises:
        ConfigError: the checkpoint is of another backend or optimizer.
    """
    stored = DcpFolder(folder) if is_stored_alike else None
    steps = read_num_steps(stored) if stored is not None and holds(stored, MOMENTUM_PREFIX) else None
    if steps is None:
        raise ConfigError(f"{folder} has no state of --optimizer muon that Megatron reads; give --no-load-optim.")
    return steps


def convert_state(state: OptimizerState, weights: NamedWeights, optimizer: MasterOptimizer, place: TensorPlace) -> None:
    """Copy masters and moments out of a checkpoint of another format, one weight at a time."""
    sources = {MASTER: state.masters, **state.moments}
    rule_of = {weight: rule for rule, weight in weights}
    for shard in optimizer.owned_shards():
        rule = rule_of[shard.weight]
        for name, source in sources.items():
            whole = to_megatron(rule, [source.read(hf_name) for hf_name in rule.hf_names], place.model)
            local = tp_shard(rule, whole, place.tp_rank, place.tp_size)
            shard.state[name].copy_(local.reshape(-1)[shard.start : shard.stop])


def _weight_tensors(weights: NamedWeights, place: TensorPlace) -> dict[str, PiecedTensor]:
    """Return the checkpoint tensors of which this rank holds something."""
    held = ((rule.checkpoint_key, rule, weight, 0, weight.detach().view(-1)) for rule, weight in weights)
    return pieced(held, place)


def _state_tensors(weights: NamedWeights, optimizer: MasterOptimizer, place: TensorPlace) -> dict[str, PiecedTensor]:
    rule_of = {weight: rule for rule, weight in weights}
    held = (
        (_STATE_KEYS[name] + rule.checkpoint_key, rule, shard.weight, shard.start, values)
        for shard in optimizer.owned_shards()
        if (rule := rule_of.get(shard.weight)) is not None
        for name, values in shard.state.items()
    )
    return pieced(held, place)


def pieced(held: Iterator[tuple[str, WeightRule, nn.Parameter, int, Tensor]], place: TensorPlace) -> dict[str, PiecedTensor]:
    """Return checkpoint tensors by key, of flat ranges of weights: key, rule, weight, start of the range, its values."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for key, rule, weight, start, values in held:
        pieces[key] += place.pieces(rule, weight.shape, start, values)
        shapes[key] = place.stored_shape(rule, weight.shape)
        dtypes[key] = values.dtype
    return {key: PiecedTensor(shapes[key], dtypes[key], pieces[key]) for key in pieces}
