"""Checkpoints of adapters that the Megatron backend trains. FSDP2 writes the same files, so each goes on from the other's.

folder/adapter_*      float32 masters, whole                PEFT, by the main rank
folder/optimizer/     moments, `<matrix>.exp_avg[_sq]`      torch.distributed.checkpoint
folder/lr_scheduler/  number of optimizer steps done        torch.distributed.checkpoint
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from qwench.checkpoints.formats.pieces import PiecedTensor
from qwench.models.megatron_names import WeightRule
from qwench.models.peft import AdapterFolder, write_adapter
from qwench.training.megatron.checkpoint import pieced
from qwench.training.megatron.lora import Adapters
from qwench.training.megatron.optimizer import MasterOptimizer
from qwench.training.megatron.weights import WholeWeights
from qwench.training.optimizers.host_adam import MASTER, MOMENTS
from qwench.training.pissa import as_one
from qwench.training.resuming import load_moments, load_num_steps, save_moments


def save_adapters(folder: Path, matrices: list[tuple[WeightRule, Tensor]], adapters: Adapters, *, is_main: bool) -> None:
    """Write one PEFT folder of this stage's trained `matrices`, their starts and the other stages'; collective."""
    gathered = WholeWeights([*matrices, *adapters.starts], adapters.rules, adapters.place.model).gather()
    whole = {name: matrix.to("cpu", torch.float32) for name, matrix in gathered}
    if is_main:
        write_adapter(folder, adapters.config(), as_one(whole))


def save_state(folder: Path, optimizer: MasterOptimizer, adapters: Adapters) -> None:
    """Write moments and step count; collective."""
    save_moments(folder, _moments(optimizer, adapters), optimizer.num_steps)


def load(folder: Path, optimizer: MasterOptimizer, adapters: Adapters, *, weights_only: bool) -> None:
    """Read matrices and masters and, unless told otherwise, moments and step count; collective.

    Raises what `AdapterFolder.of_run` does.
    """
    stored = AdapterFolder.of_run(folder, adapters.section, adapters.place.model)
    adapters.fill(stored)
    optimizer.reset(0 if weights_only else load_num_steps(folder))
    rule_of = {weight: rule for rule, weight in adapters.weights}
    for shard in optimizer.owned_shards():
        whole = adapters.share(rule_of[shard.weight], stored)
        shard.state[MASTER].copy_(whole.reshape(-1)[shard.start : shard.stop])
    if optimizer.num_steps:
        load_moments(folder, _moments(optimizer, adapters))


def whole_masters(optimizer: MasterOptimizer, adapters: Adapters) -> list[tuple[WeightRule, Tensor]]:
    """Return this stage's float32 masters, of which each data- and context-parallel rank holds a part; collective."""
    sizes = [weight.numel() for _, weight in adapters.weights]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=adapters.weights[0][1].device)
    place_of = {weight: part for (_, weight), part in zip(adapters.weights, flat.split(sizes), strict=True)}
    for shard in optimizer.owned_shards():
        place_of[shard.weight][shard.start : shard.stop].copy_(shard.state[MASTER])
    dist.all_reduce(flat, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return [(rule, place_of[weight].view(weight.shape)) for rule, weight in adapters.weights]


def _moments(optimizer: MasterOptimizer, adapters: Adapters) -> dict[str, PiecedTensor]:
    key_of = {weight: (rule.checkpoint_key, rule) for rule, weight in adapters.weights}
    held = (
        (f"{key}.{moment}", rule, shard.weight, shard.start, shard.state[moment])
        for shard in optimizer.owned_shards()
        for key, rule in (key_of[shard.weight],)
        for moment in MOMENTS
    )
    return pieced(held, adapters.place)
