"""The optimizer and its learning-rate schedule; names and defaults are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwench.config.limits import check_fraction, check_not_negative, check_positive
from qwench.errors import ConfigError

_BFLOAT16_HALF_STEP = 2.0**-8
"""Changes by less than this share may be rounded away in bfloat16."""

_QK_NORMS = ("q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight")

MomentDtype = Literal["fp32", "bf16"]
LrDecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
LrWsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimizer with float32 masters, and a schedule counted in optimizer steps."""

    optimizer: Literal["adam", "adam8bit", "muon"] = "adam"
    """adam: AdamW. adam8bit: AdamW with moments of matrices in 8 bits, 6 bytes a weight less. muon: Muon for the matrices of
    the layers, and AdamW with the same --lr for all other parameters. adam8bit needs --train-backend fsdp."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    muon_num_ns_steps: int = 5
    """Newton-Schulz steps that make Muon's update orthogonal."""
    lr: float | None = None
    """Peak learning rate. Required for training."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: LrDecayStyle = "linear"
    """Shape of the decay from --lr to --min-lr. WSD: --lr until the last --lr-wsd-decay-iters steps."""
    lr_wsd_decay_iters: int | None = None
    """Optimizer steps of the decay at the end of --lr-decay-style WSD, which requires it."""
    lr_wsd_decay_style: LrWsdDecayStyle = "exponential"
    """Shape of that decay."""
    lr_decay_iters: int | None = None
    """Optimizer steps until --min-lr, warm-up included. None: all steps of the run."""
    lr_warmup_iters: int = 0
    """Optimizer steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the decay steps, 0 <= share < 1. Excludes --lr-warmup-iters. None: off."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay. Norms and biases are not decayed."""
    apply_wd_to_qk_layernorm: bool = False
    """Decay the norms of queries and keys, too."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon added to the root of the second moment."""
    reset_optimizer_states: bool = False
    """Begin every rollout with moments of zero. The learning-rate schedule goes on."""
    use_stateless_adam: bool = False
    """Begin every step with moments of zero: AdamW then moves each weight by about --lr. It saves no memory."""
    clip_grad: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down. 0: off."""
    optimizer_cpu_offload: bool = False
    """Keep masters and moments in host memory and step on the CPU. Use it when the GPU has too little memory."""
    optimizer_offload_fraction: float = 1.0
    """Share of masters and moments that --optimizer-cpu-offload puts on the host, 0 < share <= 1."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Overlap the copies of --optimizer-cpu-offload with its steps. Needs more pinned memory; the numbers are the same."""
    use_precision_aware_optimizer: bool = False
    """Store the moments in --exp-avg-dtype and --exp-avg-sq-dtype. Steps compute in float32."""
    exp_avg_dtype: MomentDtype = "fp32"
    """What the first moment is stored in. bf16 saves memory. Needs --use-precision-aware-optimizer."""
    exp_avg_sq_dtype: MomentDtype = "fp32"
    """What the second moment is stored in. bf16 saves memory. Needs --use-precision-aware-optimizer."""

    def __post_init__(self) -> None:
        check_positive("--lr", self.lr)
        check_positive("--lr-decay-iters", self.lr_decay_iters)
        check_positive("--lr-wsd-decay-iters", self.lr_wsd_decay_iters)
        check_positive("--adam-eps", self.adam_eps)
        for flag, value in (
            ("--min-lr", self.min_lr),
            ("--lr-warmup-iters", self.lr_warmup_iters),
            ("--lr-warmup-init", self.lr_warmup_init),
            ("--weight-decay", self.weight_decay),
            ("--clip-grad", self.clip_grad),
        ):
            check_not_negative(flag, value)
        check_fraction("--optimizer-offload-fraction", self.optimizer_offload_fraction)
        for flag, beta in (("--adam-beta1", self.adam_beta1), ("--adam-beta2", self.adam_beta2)):
            if not 0 <= beta < 1:
                raise ConfigError(f"{flag} must be at least 0 and less than 1, got {beta}")
        if self.optimizer_offload_fraction != 1.0 and not self.optimizer_cpu_offload:
            raise ConfigError(f"--optimizer-offload-fraction ({self.optimizer_offload_fraction}) needs --optimizer-cpu-offload")
        if self.overlap_cpu_optimizer_d2h_h2d and not self.optimizer_cpu_offload:
            raise ConfigError("--overlap-cpu-optimizer-d2h-h2d needs --optimizer-cpu-offload, whose copies it overlaps")
        self._check_moments()
        self._check_muon()
        self._check_schedule()

    @property
    def offloaded_share(self) -> float:
        """Return the share of masters and moments that is on the host."""
        return self.optimizer_offload_fraction if self.optimizer_cpu_offload else 0.0

    def decays(self, name: str, ndim: int) -> bool:
        """Tell whether --weight-decay acts on a weight, by its name of Hugging Face or of Megatron."""
        return ndim > 1 or (self.apply_wd_to_qk_layernorm and name.endswith(_QK_NORMS))

    def _check_moments(self) -> None:
        for flag, dtype, beta_flag, beta in (
            ("--exp-avg-dtype", self.exp_avg_dtype, "--adam-beta1", self.adam_beta1),
            ("--exp-avg-sq-dtype", self.exp_avg_sq_dtype, "--adam-beta2", self.adam_beta2),
        ):
            if dtype == "fp32":
                continue
            if not self.use_precision_aware_optimizer:
                raise ConfigError(f"{flag} {dtype} needs --use-precision-aware-optimizer; add it")
            if 1 - beta < _BFLOAT16_HALF_STEP:
                raise ConfigError(
                    f"{flag} {dtype} rounds away a decay by {beta_flag} ({beta}): the average would never shrink; "
                    f"give {beta_flag} 0.99 or less, or leave {flag} out"
                )

    def _check_muon(self) -> None:
        check_positive("--muon-num-ns-steps", self.muon_num_ns_steps)
        if not 0 <= self.muon_momentum < 1:
            raise ConfigError(f"--muon-momentum must be at least 0 and less than 1, got {self.muon_momentum}")
        if self.optimizer != "adam":
            for flag, is_given in (
                ("--optimizer-cpu-offload", self.optimizer_cpu_offload),
                ("--use-precision-aware-optimizer", self.use_precision_aware_optimizer),
            ):
                if is_given:
                    raise ConfigError(
                        f"{flag} is for --optimizer adam, and {self.optimizer} has its own moments on the device; leave one "
                        "of them out"
                    )
        if self.optimizer == "muon":
            return
        for flag, is_given in (
            ("--muon-momentum", self.muon_momentum != 0.95),
            ("--muon-num-ns-steps", self.muon_num_ns_steps != 5),
        ):
            if is_given:
                raise ConfigError(f"{flag} has no effect with --optimizer {self.optimizer}; give muon, or leave it out")

    def _check_schedule(self) -> None:
        if self.lr is not None and self.min_lr > self.lr:
            raise ConfigError(f"--min-lr ({self.min_lr}) is greater than --lr ({self.lr})")
        if self.lr is not None and self.lr_warmup_init > self.lr:
            raise ConfigError(f"--lr-warmup-init ({self.lr_warmup_init}) is greater than --lr ({self.lr})")
        self._check_wsd()
        if self.lr_warmup_fraction is None:
            return
        if not 0 <= self.lr_warmup_fraction < 1:
            raise ConfigError(f"--lr-warmup-fraction must be at least 0 and less than 1, got {self.lr_warmup_fraction}")
        if self.lr_warmup_iters:
            raise ConfigError(
                f"--lr-warmup-fraction ({self.lr_warmup_fraction}) and --lr-warmup-iters ({self.lr_warmup_iters}) both set the "
                "warm-up; give one of them"
            )

    def _check_wsd(self) -> None:
        if self.lr_decay_style == "WSD":
            if self.lr_wsd_decay_iters is None:
                raise ConfigError("--lr-decay-style WSD decays over the last steps; give their number by --lr-wsd-decay-iters")
            return
        for flag, is_given in (
            ("--lr-wsd-decay-iters", self.lr_wsd_decay_iters is not None),
            ("--lr-wsd-decay-style", self.lr_wsd_decay_style != "exponential"),
        ):
            if is_given:
                raise ConfigError(
                    f"{flag} has no effect with --lr-decay-style {self.lr_decay_style}; give WSD, or leave it out"
                )
