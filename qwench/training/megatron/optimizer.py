"""AdamW on float32 masters that megatron-core's distributed optimizer shards over the data- and context-parallel ranks.

    gradient in float32 buffer --reduce-scatter, sum--> flat shard --AdamW--> master shard --round, all-gather--> weight

One path for every layout: a single rank is a group of one. Each rank owns a flat range of each weight it has a share of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from qwench.config.sections.optimizer import OptimizerConfig as OptimizerSection
from qwench.models.megatron_names import WeightRule
from qwench.training.megatron.muon import MatrixShard, ShardedMuon, trained_matrices
from qwench.training.megatron.tensor_place import TensorPlace
from qwench.training.optimizers.host_adam import APART, MASTER, HostAdam
from qwench.training.optimizers.schedule import LrSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnedShard:
    """This rank's shard of one weight, and its state."""

    weight: nn.Parameter
    start: int
    """Of the shard in the flattened weight."""
    stop: int
    state: Mapping[str, Tensor]
    """The live flat [stop - start] master and moments, by MASTER and the names of the moments."""


def wrap_in_ddp(model: nn.Module) -> DistributedDataParallel:
    """Give the weights one contiguous buffer, and float32 gradient buffers that are summed over the ranks once a step."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=True, average_in_collective=False
    )
    return DistributedDataParallel(model.config, config, model)


class MasterOptimizer:
    """Steps the float32 masters and writes their rounding into the weights."""

    def __init__(
        self,
        model: DistributedDataParallel,
        section: OptimizerSection,
        *,
        total_steps: int,
        weights: Sequence[tuple[WeightRule, nn.Parameter]],
        place: TensorPlace,
    ) -> None:
        """Shard the state of `model`'s weights; masters are copies of the weights as they are now.

        Args:
            weights: The model's own, with their rules.
        """
        self.num_steps = 0
        self._model = model
        self.schedule = LrSchedule(section, total_steps=total_steps)
        self._clip_grad, self._is_stateless = section.clip_grad, section.use_stateless_adam
        self.has_momentum = section.optimizer == "muon"
        """Muon steps the matrices. The same on every stage, also on one whose matrices are frozen."""
        matrices = trained_matrices(weights) if self.has_momentum else {}
        self._adam = HostAdam.from_section(_groups(model, section, matrices), section)
        dtype = next(weight.dtype for weight in model.parameters() if weight.requires_grad)
        self._config = OptimizerConfig(
            optimizer="adam",
            lr=self.schedule.peak,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            clip_grad=section.clip_grad,
            use_distributed_optimizer=True,
        )
        # Masters are the inner optimizer's business. The flag that says so, use_precision_aware_optimizer, sets this field,
        # but only after it has found Transformer Engine.
        self._config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        self.sharded = DistributedOptimizer(
            self._adam,
            self._config,
            grad_scaler=None,
            init_state_fn=None,
            model_chunks=[model],
            per_model_buffers={0: model.buffers},
            data_parallel_group=model.intra_dp_cp_group,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=parallel_state.get_model_parallel_group().rank(),
            distributed_optimizer_instance_id=0,
        )
        # megatron-core's own factory sets these two after the construction.
        self.sharded.grad_stats_parallel_group = parallel_state.get_intra_distributed_optimizer_instance_group()
        self.sharded.tp_group = model.tp_group
        self._muon: ShardedMuon | None = None
        if matrices:
            shards = [self._matrix_shard(rule, weight) for weight, rule in matrices.items()]
            self._muon = ShardedMuon(shards, section, place=place, group=model.intra_dp_cp_group)
        for optimizer in self._optimizers:
            optimizer.reset()

    @property
    def _optimizers(self) -> list[HostAdam]:
        return [self._adam] if self._muon is None else [self._adam, self._muon]

    def _matrix_shard(self, rule: WeightRule, weight: nn.Parameter) -> MatrixShard:
        place = self.sharded.model_param_group_index_map.get(weight)
        if place is None:
            return MatrixShard(rule=rule, weight=weight, values=None)
        group, position = place
        start = self.sharded._get_model_param_range_map(weight)["param"].start
        return MatrixShard(rule=rule, weight=weight, values=self._adam.param_groups[group]["params"][position], start=start)

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient, before clipping; collective over all ranks."""
        self.sharded.prepare_grads()
        return float(self.sharded.get_grad_norm())

    def step(self, grad_norm: float) -> list[float]:
        """Clip by `grad_norm`, update, drop the gradients, and return the learning rate of each parameter group."""
        if 0.0 < self._clip_grad < grad_norm:
            clip_grad_by_total_norm_fp32(
                self.sharded.get_parameters(),
                self._clip_grad,
                grad_norm,
                self._config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
        if self._is_stateless:
            self.forget_moments()
        learning_rate = self.schedule.at(self.num_steps)
        for group in self.sharded.param_groups:
            group["lr"] = learning_rate
        if self._muon is not None:
            self._muon.param_groups[0]["lr"] = learning_rate
            self._muon.step()
        self.sharded.step_with_ready_grads()
        self.num_steps += 1
        self.drop_gradients()
        return [learning_rate] * len(self.sharded.param_groups)

    def prepare(self) -> None:
        """Do nothing: masters and moments are made with the optimizer."""

    def drop_gradients(self) -> None:
        """Start the sums of the next step at zero."""
        self._model.zero_grad_buffer()
        self.sharded.zero_grad()

    def reset(self, num_steps: int) -> None:
        """Start over as after `num_steps` steps: masters equal the weights, moments are zero until a checkpoint is read."""
        self.num_steps = num_steps
        for optimizer in self._optimizers:
            optimizer.reload_masters()
            optimizer.restart(num_steps)

    def forget_moments(self) -> None:
        """Set moments, and the steps that correct their bias, to zero; masters and schedule go on."""
        for optimizer in self._optimizers:
            optimizer.restart(0)

    def owned_shards(self) -> Iterator[OwnedShard]:
        """Yield this rank's shards, weight by weight."""
        for weight, (group, position) in self.sharded.model_param_group_index_map.items():
            shard = self._adam.param_groups[group]["params"][position]
            range_ = self.sharded._get_model_param_range_map(weight)["param"]
            [optimizer] = [optimizer for optimizer in self._optimizers if shard in optimizer.state]
            state = {name: optimizer.state[shard][name] for name in (MASTER, *optimizer.moment_names)}
            yield OwnedShard(weight=weight, start=range_.start, stop=range_.end, state=state)

    def device_tensors(self) -> list[Tensor]:
        """Return masters and moments that take memory of the device besides the weights."""
        return [tensor for optimizer in self._optimizers for tensor in optimizer.device_tensors()]

    def group_constants(self) -> list[dict[str, object]]:
        """Return the constants of the parameter groups."""
        return [{name: value for name, value in group.items() if name != "params"} for group in self.sharded.param_groups]


def _groups(model: nn.Module, section: OptimizerSection, matrices: Collection[nn.Parameter]) -> list[dict[str, object]]:
    """Return the trained weights in parameter groups; `matrices` are stepped apart."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad and weight not in matrices]
    decayed = [weight for name, weight in trained if section.decays(name, weight.ndim)]
    kept = [weight for name, weight in trained if not section.decays(name, weight.ndim)]
    groups = [
        _group(decayed, wd_mult=1.0, weight_decay=section.weight_decay),
        _group(kept, wd_mult=0.0, weight_decay=0.0),
        _group(matrices, wd_mult=1.0, weight_decay=section.weight_decay) | {APART: True},
    ]
    return [group for group in groups if group["params"]]  # adapters are matrices alone


def _group(weights: Iterable[nn.Parameter], *, wd_mult: float, weight_decay: float) -> dict[str, object]:
    """Return a parameter group with the fields by which Megatron tells groups of a checkpoint apart."""
    marks = {"wd_mult": wd_mult, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    return {"params": list(weights), "weight_decay": weight_decay, **marks}
