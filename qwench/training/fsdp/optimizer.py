"""AdamW on float32 shards: Megatron's weight-decay rule, global gradient clipping, and a state with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from qwench.training.adam import MOMENTS, NORM_EPS, AdamSettings
from qwench.training.schedule import LrSchedule


class MasterOptimizer:
    """Steps the float32 masters; the fused kernel on every device, and an update per shard, since AdamW is element-wise."""

    def __init__(
        self, weights: Mapping[str, nn.Parameter], settings: AdamSettings, schedule: LrSchedule, shard_group: dist.ProcessGroup
    ) -> None:
        """Keep `weights` by name; `shard_group` are the ranks that together hold one copy of the model."""
        self.num_steps = 0
        self._weights = dict(weights)
        self._schedule = schedule
        self._clip_grad = settings.clip_grad
        self._shard_group = shard_group
        decayed = [w for w in self._weights.values() if w.ndim > 1]
        kept = [w for w in self._weights.values() if w.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=schedule.peak, betas=settings.betas, eps=settings.eps, fused=True
        )

    def grad_norm(self) -> Tensor:
        """Return the norm [] float32 of the whole gradient, on the device; collective over the shards."""
        squares = get_total_norm(self._local_gradients()).square()
        dist.all_reduce(squares, group=self._shard_group)
        return squares.sqrt()

    def step(self, grad_norm: float) -> list[float]:
        """Clip by `grad_norm`, update, drop the gradients, and return the learning rate of each parameter group."""
        if 0.0 < self._clip_grad < grad_norm:
            for gradient in self._local_gradients():
                gradient.mul_(self._clip_grad / (grad_norm + NORM_EPS))
        learning_rate = self._schedule.at(self.num_steps)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self.num_steps += 1
        self.drop_gradients()
        return [learning_rate] * len(self._adam.param_groups)

    def drop_gradients(self) -> None:
        """Forget the gradients and give their memory back."""
        self._adam.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """Return the sharded moments by name (`<weight>.exp_avg`, `<weight>.exp_avg_sq`); empty before the first step."""
        states = ((name, self._adam.state.get(weight, {})) for name, weight in self._weights.items())
        return {f"{name}.{moment}": state[moment] for name, state in states if state for moment in MOMENTS}

    def reset(self, num_steps: int) -> None:
        """Start over as after `num_steps` steps, with moments of zero that a checkpoint is then read into."""
        self.num_steps = num_steps
        self._adam.state.clear()
        for weight in self._weights.values():
            moments = {moment: torch.zeros_like(weight.detach()) for moment in MOMENTS}
            step = torch.tensor(float(num_steps), dtype=torch.float32, device=weight.device)
            self._adam.state[weight] = {"step": step, **moments}

    def _local_gradients(self) -> Sequence[Tensor]:
        gradients = [weight.grad for weight in self._weights.values()]
        assert all(isinstance(gradient, DTensor) for gradient in gradients), "every weight has a reduced gradient"
        return [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
