"""Muon: momentum of a matrix, made nearly orthogonal, is its step; all other parameters are AdamW's.

    M = mu M + G         U = G + mu M  (Nesterov)         O = newton_schulz(U)
    W = W - lr (0.2 sqrt(max(rows, columns)) O + weight_decay W)

O has the singular vectors of U, and singular values near 1. The factor gives a step the size of AdamW's, so that both have one
learning rate and one weight decay.

Source: Muon (Keller Jordan, 2024, kellerjordan.github.io/posts/muon); factor and weight decay: Moonlight (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qwench.checkpoints.formats.sources import MOMENTUM
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.training.optimizers.host_adam import MASTER, REST, HostAdam, adam_constants, gradient_of
from qwench.training.optimizers.split_masters import join

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ADAM_SIZE = 0.2
"""Root mean square of AdamW's steps."""
_NOT_HIDDEN = ("embed_tokens.weight", "lm_head.weight")

Whole = Callable[[Tensor, Tensor], Tensor]
"""(parameter, a tensor in its layout on this rank) -> the whole matrix; collective."""
Part = Callable[[Tensor, Tensor], Tensor]
"""(parameter, a whole matrix) -> this rank's part of it."""


def takes(name: str, weight: Tensor) -> bool:
    """Tell whether Muon steps a weight: the matrices of the layers, not embedding and head."""
    return weight.ndim == 2 and not name.endswith(_NOT_HIDDEN)


def orthogonalised(matrix: Tensor, *, num_steps: int) -> Tensor:
    """Return the matrix with singular values near 1, by Newton-Schulz steps on the smaller side; in bfloat16 on a GPU."""
    a, b, c = _COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    turned: Tensor = x.T if is_tall else x
    return turned.to(matrix.dtype)


class Muon(HostAdam):
    """Keeps masters as `HostAdam` does, all on the device, and one momentum for each matrix."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        section: OptimizerConfig,
        *,
        whole: Whole = lambda _, values: values,
        part: Part = lambda _, whole: whole,
        splits_masters: bool = True,
    ) -> None:
        """Take a group of matrices, or of this rank's rows of them."""
        super().__init__(
            params,
            **adam_constants(section),
            offload_fraction=0.0,
            moment_dtypes=(torch.float32,),
            moments=(MOMENTUM,),
            splits_masters=splits_masters,
        )
        self._momentum, self._num_ns_steps = section.muon_momentum, section.muon_num_ns_steps
        self._whole, self._part = whole, part

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # see HostAdam
        """Update masters, momenta and parameters by the gradients, which every parameter must have; collective."""
        assert closure is None, "gradients are computed before the step"
        self._count_steps(int(self._num_steps) + 1)
        for param in self._params():
            self._move(param, self._part(param, self._orthogonal(self._whole(param, self._sum(param)))))

    def _sum(self, param: Tensor) -> Tensor:
        """Add the gradient to the momentum, and return what is made orthogonal."""
        gradient = gradient_of(param).float()
        momentum: Tensor = self.state[param][MOMENTUM]
        momentum.mul_(self._momentum).add_(gradient)
        return gradient.add(momentum, alpha=self._momentum)

    def _orthogonal(self, whole: Tensor) -> Tensor:
        """Return the update of a whole matrix, in the size of AdamW's."""
        return orthogonalised(whole, num_steps=self._num_ns_steps).mul(_ADAM_SIZE * math.sqrt(max(whole.shape)))

    def _move(self, param: Tensor, update: Tensor) -> None:
        """Decay the master of a parameter and subtract the update."""
        [group] = self.param_groups
        state: Mapping[str, Tensor] = self.state[param]
        master = join(param, state[REST]) if REST in state else state[MASTER]
        master.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        self.set_master(param, master)
