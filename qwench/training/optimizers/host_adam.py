"""AdamW whose float32 masters and moments live on the host, all of them or a share; shared by both backends.

    parameter (device, its own dtype)   decoupled_grad or grad (device, float32)
    state, for a parameter on the host: master_param float32, exp_avg and exp_avg_sq each float32 or bfloat16, all on the host
    state, for one on the device:       the same there; a float32 parameter is its own master, and a bfloat16 one may be
                                        the upper half of it: master_rest int16 is the lower half

A step computes in float32 for every dtype of the moments: bfloat16 moments are widened a bucket at a time, and rounded to
nearest when they are stored. Parameters are the rounded masters.

It replaces megatron-core's HybridDeviceOptimizer, which keeps moments in float32 only, and whose masters do not follow loaded
weights. It also replaces Transformer Engine's FusedAdam: megatron-core's DistributedOptimizer calls `get_unscaled_state` and
`set_scaled_state` on an optimizer that holds the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from qwench.config.sections.optimizer import OptimizerConfig
from qwench.training.optimizers.pinned_buckets import HostCopies, Span, buckets_of, cut
from qwench.training.optimizers.split_masters import join, split

MASTER = "master_param"
"""Name of the float32 masters, in Megatron and in Transformer Engine."""
REST = "master_rest"
"""Name of what bfloat16 parameters lack of their masters; see `split_masters`."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the running averages, in torch and in Megatron."""
APART = "is_stepped_apart"
"""Mark of a parameter group that another optimizer steps."""
BUCKET_ELEMENTS = 1 << 24
"""Elements stepped at a time: 64 MiB of gradients, some milliseconds of copies."""
_HOST = torch.device("cpu")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class AdamConstants(TypedDict):
    """What torch's AdamW takes besides parameters."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def adam_constants(section: OptimizerConfig) -> AdamConstants:
    """Return the constants that the flags give."""
    assert section.lr is not None, "config.verb_checks requires --lr"
    betas = (section.adam_beta1, section.adam_beta2)
    return AdamConstants(lr=section.lr, betas=betas, eps=section.adam_eps, weight_decay=section.weight_decay)


class HostAdam(torch.optim.AdamW):
    """See the module docstring. Life: construct -> reset -> (step | restart | masters and moments loaded)*."""

    has_split_kernel = True
    """A kernel steps split masters with moments as they are stored."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        offload_fraction: float = 1.0,
        overlap: bool = True,
        moment_dtypes: Sequence[torch.dtype] = (torch.float32, torch.float32),
        moments: Sequence[str] = MOMENTS,
        splits_masters: bool = False,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        """Take parameters or groups of them, as torch's AdamW does; no state is made before `reset`.

        Args:
            offload_fraction: Share of the elements, first groups first, whose state is on the host; the parameter that
                crosses the share is offloaded as a whole.
            overlap: Copy gradients and weights while the host computes; the numbers do not depend on it.
            moment_dtypes: What the moments are stored in.
            moments: Names of the running averages.
            splits_masters: Bfloat16 parameters on the device are the upper halves of their masters.
            bucket_elements: Bounds the buffers: at most three buckets of gradients and of weights, pinned, and one of moments.
        """
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._offload_fraction = offload_fraction
        self._overlap = overlap
        self._moment_dtypes = dict(zip(moments, moment_dtypes, strict=True))
        self._splits_masters = splits_masters
        self._bucket_elements = bucket_elements
        self._num_steps = torch.tensor(0.0)
        self._on_host: set[Tensor] = set()
        self._host_buckets: list[list[Span]] = []
        self._device_buckets: list[list[Span]] = []
        self._group_index: dict[Tensor, int] = {}
        self._copies: HostCopies | None = None
        self._widened: Mapping[str, Tensor] = {}

    @classmethod
    def from_section(
        cls, groups: Iterable[dict[str, Any]], section: OptimizerConfig, *, splits_masters: bool = False
    ) -> HostAdam:
        """Take groups of parameters, and the constants from the flags."""
        return cls(
            groups,
            **adam_constants(section),
            offload_fraction=section.offloaded_share,
            overlap=section.overlap_cpu_optimizer_d2h_h2d,
            moment_dtypes=(_DTYPES[section.exp_avg_dtype], _DTYPES[section.exp_avg_sq_dtype]),
            splits_masters=splits_masters,
        )

    @torch.no_grad()
    def reset(self) -> None:
        """Reset the state to the parameters: masters equal to them, moments of zero, no steps done."""
        self._on_host = self._choose_offloaded()
        self.state.clear()
        for param in self._params():
            on_host = param in self._on_host
            device = _HOST if on_host else param.device
            moments = {
                name: torch.zeros(param.shape, dtype=dtype, device=device) for name, dtype in self._moment_dtypes.items()
            }
            self.state[param] = {"step": self._num_steps, **self._initial_master(param, on_host=on_host), **moments}
        self._count_steps(0)
        self._lay_out_buckets()

    def _initial_master(self, param: Tensor, *, on_host: bool) -> dict[str, Tensor]:
        """Return the state of a master that is equal to its parameter."""
        if on_host:
            return {MASTER: param.detach().to(_HOST, torch.float32, copy=True)}
        if param.dtype == torch.float32:
            return {MASTER: param.detach()}
        if self._splits_masters:
            return {REST: torch.zeros(param.shape, dtype=torch.int16, device=param.device)}
        return {MASTER: param.detach().float()}

    def restart(self, num_steps: int) -> None:
        """Set the moments to zero and the step count to `num_steps`; masters stay."""
        for state in self.state.values():
            for name in self._moment_dtypes:
                state[name].zero_()
        self._count_steps(num_steps)

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Set the masters to the parameters, which were changed from outside."""
        for param in self._params():
            self.set_master(param, param.detach().float())

    def master(self, param: Tensor) -> Tensor:
        """Return the float32 master: itself, or a copy on the host of one that is split."""
        state = self.state[param]
        return join(param, state[REST]).to(_HOST) if REST in state else state[MASTER]

    @torch.no_grad()
    def set_master(self, param: Tensor, master: Tensor) -> None:
        """Write a master, and its rounding to the parameter; `master` may be what `self.master` returned."""
        state = self.state[param]
        if REST in state:
            split(master.to(param.device), param, state[REST])
        else:
            state[MASTER].copy_(master)
            param.detach().copy_(state[MASTER].to(param.dtype))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # a closure has no use here
        """Update masters, moments and parameters by the gradients, which every parameter must have."""
        assert closure is None, "gradients are computed before the step"
        assert self.state, "reset comes first"
        self._count_steps(int(self._num_steps) + 1)
        if self._split_kernel_steps:
            self._step_split()
        for bucket in () if self._split_kernel_steps else self._device_buckets:
            gradients = [span.of(gradient_of(span.param)) for span in bucket]
            if REST in self.state[bucket[0].param]:
                self._update_split(bucket, gradients)
                continue
            self._update(bucket, gradients, self._cut_states(bucket, MASTER))
            for span in bucket:
                if span.param.dtype != torch.float32:
                    span.of(span.param).copy_(span.of(self.state[span.param][MASTER]))
        if self._copies is not None:
            self._copies.run(self._host_buckets, gradient_of, self._update_on_host)

    def device_tensors(self) -> list[Tensor]:
        """Return masters and moments that take memory of the device besides the parameters."""
        tensors: list[Tensor] = []
        for param, state in self.state.items():
            if param not in self._on_host:
                masters = (REST,) if REST in state else () if param.dtype == torch.float32 else (MASTER,)
                tensors += [state[name] for name in (*self._moment_dtypes, *masters)]
        return tensors

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """Return a state of `param` in float32."""
        state: Tensor = self.state[param][name]
        return state.to(torch.float32)

    def moment(self, param: Tensor, name: str) -> Tensor:
        """Return a moment to be saved, or to be read into and given to `set_scaled_state`: as it is stored, or float32."""
        if self._moment_dtypes[name] == torch.uint8:
            return self.get_unscaled_state(param, name)
        state: Tensor = self.state[param][name]
        return state

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        """Write a state of `param`, rounded to its stored dtype."""
        self.state[param][name].copy_(value)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Read what `state_dict` returned, exactly: torch's own would cast every state to its parameter's dtype and device.

        A state without parameters is that of an optimizer that was never reset, and resets this one.
        """
        if not self.state or not state_dict["state"]:
            self.reset()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    if name != "step":
                        self.set_scaled_state(param, name, value)
            group.update({name: value for name, value in saved.items() if name != "params"})
        self._count_steps(int(self.param_groups[0].get("step", 0)))

    @property
    def moment_names(self) -> tuple[str, ...]:
        """Return the names of the running averages."""
        return tuple(self._moment_dtypes)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups if APART not in group for param in group["params"]]

    def _choose_offloaded(self) -> set[Tensor]:
        """Choose as megatron-core's HybridDeviceOptimizer does: in order, until the share is reached."""
        params = self._params()
        wanted = self._offload_fraction * sum(param.numel() for param in params)
        chosen: set[Tensor] = set()
        num_elements = 0
        for param in params:
            if num_elements < wanted:
                chosen.add(param)
                num_elements += param.numel()
        return chosen

    def _lay_out_buckets(self) -> None:
        self._host_buckets, self._device_buckets, self._group_index = [], [], {}
        for index, group in enumerate(self.param_groups):
            if APART in group:
                continue
            for on_host, buckets in ((True, self._host_buckets), (False, self._device_buckets)):
                params = [param for param in group["params"] if (param in self._on_host) == on_host]
                buckets += buckets_of(params, max_elements=self._bucket_elements)
            self._group_index.update(dict.fromkeys(group["params"], index))
        self._copies, self._widened = None, {}
        if not self._host_buckets:
            return
        largest = max(sum(span.stop - span.start for span in bucket) for bucket in self._host_buckets)
        [kind] = {(span.param.device, span.param.dtype) for bucket in self._host_buckets for span in bucket}
        self._copies = HostCopies(max_elements=largest, weight_dtype=kind[1], device=kind[0], overlap=self._overlap)
        self._widened = {name: torch.empty(largest, dtype=torch.float32) for name in MOMENTS if self._is_widened(name)}

    def _update_on_host(self, bucket: Sequence[Span], gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        masters = self._cut_states(bucket, MASTER)
        self._update(bucket, gradients, masters)
        for weight, master in zip(weights, masters, strict=True):
            weight.copy_(master)

    def _update_split(self, bucket: Sequence[Span], gradients: Sequence[Tensor]) -> None:
        """Step a bucket on the device whose masters are split, without the kernel."""
        parts = [(span.of(span.param), span.of(self.state[span.param][REST])) for span in bucket]
        masters = [join(param, rest) for param, rest in parts]
        self._update(bucket, gradients, masters)
        for master, (param, rest) in zip(masters, parts, strict=True):
            split(master, param, rest)

    @property
    def _split_kernel_steps(self) -> bool:
        """Tell whether the kernel steps what is on the device."""
        on_device = (param for param in self._params() if param not in self._on_host)
        first = next(on_device, None)
        return self.has_split_kernel and first is not None and first.is_cuda and REST in self.state[first]

    def _step_split(self) -> None:
        """Step all parameters on the device, whose masters are split, a group at a time."""
        import qwench.training.optimizers.split_adam_triton as kernel  # noqa: PLC0415 - Triton comes with GPU builds of PyTorch

        for group in self.param_groups:
            constants = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            params = [param for param in group["params"] if param not in self._on_host]
            parts = [
                (param, self.state[param][REST], gradient_of(param), *(self.state[param][name] for name in MOMENTS))
                for param in params
            ]
            kernel.step(parts, num_steps=int(self._num_steps), **constants)

    def _update(self, bucket: Sequence[Span], gradients: Sequence[Tensor], masters: list[Tensor]) -> None:
        """Step masters and moments of a bucket where they are; torch's fused kernel uses all cores, or the device."""
        group = self.param_groups[self._group_index[bucket[0].param]]
        exp_avgs, exp_avg_sqs = (self._widen(bucket, name) for name in MOMENTS)
        done = torch.full((len(bucket),), float(self._num_steps) - 1, dtype=torch.float32, device=masters[0].device)
        beta1, beta2 = group["betas"]
        adamw(
            masters,
            list(gradients),
            exp_avgs,
            exp_avg_sqs,
            [],
            list(done.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, widened in zip(MOMENTS, (exp_avgs, exp_avg_sqs), strict=True):
            if self._is_widened(name):
                self._store(bucket, name, widened)

    def _store(self, bucket: Sequence[Span], name: str, widened: Sequence[Tensor]) -> None:
        """Store a moment of the bucket that was widened."""
        for stored, moment in zip(self._cut_states(bucket, name), widened, strict=True):
            stored.copy_(moment)

    def _is_widened(self, name: str) -> bool:
        return self._moment_dtypes[name] != torch.float32

    def _widen(self, bucket: Sequence[Span], name: str) -> list[Tensor]:
        """Return a moment of the bucket in float32: itself, or a copy."""
        stored = self._cut_states(bucket, name)
        if not self._is_widened(name):
            return stored
        if bucket[0].param not in self._on_host:
            return [moment.float() for moment in stored]
        return [wide.copy_(moment) for wide, moment in zip(cut(self._widened[name], bucket), stored, strict=True)]

    def _cut_states(self, bucket: Sequence[Span], name: str) -> list[Tensor]:
        return [span.of(self.state[span.param][name]) for span in bucket]

    def _count_steps(self, num_steps: int) -> None:
        """Keep the count where torch's AdamW has it (per parameter), and where Transformer Engine's has it (per group)."""
        self._num_steps.fill_(num_steps)
        for state in self.state.values():
            state["step"] = self._num_steps
        for group in self.param_groups:
            group["step"] = num_steps


def gradient_of(param: Tensor) -> Tensor:
    """Return the gradient; Megatron leaves it in `decoupled_grad` where its dtype is not the parameter's, and so do we."""
    gradient = getattr(param, "decoupled_grad", None)
    if gradient is None:
        gradient = param.grad
    assert isinstance(gradient, Tensor), "every parameter has a gradient"
    return gradient
