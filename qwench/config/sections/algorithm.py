"""What is optimised: advantages, policy loss, KL and corrections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwench.config.checks import check_fraction, check_not_negative, check_positive
from qwench.errors import ConfigError
from qwench.estimators import METHODS, check_estimator

KlType = Literal["k1", "k2", "k3", "low_var_kl"]
TisMode = Literal["truncate", "icepop"]
LossType = Literal["policy_loss", "sft_loss", "custom_loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgorithmConfig:
    """The estimator and its constants."""

    advantage_estimator: str = "grpo"
    """The method: grpo or another name of qwench.estimators. It sets how rewards become advantages, and the policy loss."""
    loss_type: LossType = "policy_loss"
    """policy_loss: reinforcement learning; sft_loss: supervised fine-tuning (what qwench sft sets)."""
    calculate_per_token_loss: bool = False
    """Mean over all tokens of a step, instead of the mean over samples of each sample's mean."""
    disable_compute_advantages_and_returns: bool = False
    """No advantages are needed; true of --loss-type sft_loss, and only accepted with it."""
    eps_clip: float = 0.2
    """The policy ratio is clipped at 1 - this."""
    eps_clip_high: float | None = None
    """The policy ratio is clipped at 1 + this (clip-higher). None: --eps-clip."""
    eps_clip_c: float | None = None
    """Dual clip: bounds the loss of negative advantages at this (> 1) times the advantage. None: off."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference inside the reward (both REINFORCE++ estimators; grpo has --kl-loss-coef)."""
    use_kl_loss: bool = False
    """Add the KL to the reference to the loss, at weight --kl-loss-coef; loads the reference, also at weight 0."""
    kl_loss_coef: float = 0.0
    """Weight of the KL term of the loss."""
    kl_loss_type: KlType = "k1"
    """Estimator of the KL."""
    use_unbiased_kl: bool = False
    """Weight the KL term by the policy ratio, which makes its gradient unbiased."""
    ref_update_interval: int | None = None
    """The reference becomes the current policy every so many rollouts. None: it stays what it was."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    observe_training_entropy: bool = False
    """Compute and log the entropy also when its weight is 0."""
    disable_rewards_normalization: bool = False
    """Use raw rewards: no subtraction of the group's mean."""
    disable_grpo_std_normalization: bool = False
    """Do not divide by the group's standard deviation (always so in groups of one)."""
    normalize_advantages: bool = False
    """Whiten advantages over all tokens of the rollout; both REINFORCE++ estimators require it."""
    gamma: float = 1.0
    """Discount for each token (reinforce_plus_plus)."""
    use_tis: bool = False
    """Truncated importance sampling: correct for the gap between the engine's and the trainer's log-probs."""
    tis_mode: TisMode = "truncate"
    """Importance weights outside --tis-clip-low to --tis-clip become the nearer bound (truncate) or 0 (icepop)."""
    tis_clip: float = 2.0
    """Upper bound of the importance weight."""
    tis_clip_low: float = 0.0
    """Lower bound of the importance weight."""
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs as the old policy's, instead of recomputing them in the trainer."""
    get_mismatch_metrics: bool = False
    """Log how far the engine's log-probs are from the trainer's without correcting for it."""
    use_opsm: bool = False
    """Off-policy sequence masking: drop sequences of negative advantage that drifted further than --opsm-delta."""
    opsm_delta: float = 1e-4
    """Mean log-ratio of a sequence above which --use-opsm drops it."""

    def __post_init__(self) -> None:
        check_estimator(self.advantage_estimator)
        for flag, value in (
            ("--eps-clip", self.eps_clip),
            ("--eps-clip-high", self.eps_clip_high),
            ("--tis-clip", self.tis_clip),
            ("--ref-update-interval", self.ref_update_interval),
        ):
            check_positive(flag, value)
        for flag, coefficient in (
            ("--kl-coef", self.kl_coef),
            ("--kl-loss-coef", self.kl_loss_coef),
            ("--tis-clip-low", self.tis_clip_low),
        ):
            check_not_negative(flag, coefficient)
        check_fraction("--gamma", self.gamma)
        self._check_clipping()
        self._check_kl()
        self._check_corrections()
        self._check_advantages()

    def _check_clipping(self) -> None:
        if METHODS[self.advantage_estimator].clips_weights:
            if self.eps_clip_c is not None:
                name = self.advantage_estimator
                raise ConfigError(f"--eps-clip-c ({self.eps_clip_c}) has no effect on {name}, which clips weights, not losses")
        elif self.eps_clip >= 1:
            raise ConfigError(f"--eps-clip must be less than 1, got {self.eps_clip}; only cispo may leave the ratio free below")
        if self.eps_clip_c is not None and not self.eps_clip_c > 1:
            raise ConfigError(
                f"--eps-clip-c must be greater than 1, got {self.eps_clip_c}; leave it out to turn dual clipping off"
            )

    def _check_kl(self) -> None:
        if self.kl_coef and self.kl_loss_coef:
            raise ConfigError(
                f"--kl-coef ({self.kl_coef}) and --kl-loss-coef ({self.kl_loss_coef}) both penalise the same KL; set one to 0"
            )
        if self.kl_loss_coef and not self.use_kl_loss:
            raise ConfigError(f"--kl-loss-coef ({self.kl_loss_coef}) has no effect without --use-kl-loss; add it")
        if self.use_unbiased_kl and not self.use_kl_loss:
            raise ConfigError("--use-unbiased-kl has no effect without --use-kl-loss; add it")
        if self.kl_coef and not METHODS[self.advantage_estimator].token_kl:
            raise ConfigError(
                f"--kl-coef ({self.kl_coef}) has no effect on {self.advantage_estimator}; use --use-kl-loss and --kl-loss-coef"
            )
        if self.ref_update_interval is not None and not self.needs_reference:
            raise ConfigError(
                f"--ref-update-interval ({self.ref_update_interval}) has no effect without a reference; add --use-kl-loss"
            )

    def _check_corrections(self) -> None:
        if self.use_rollout_logprobs and self.use_tis:
            raise ConfigError("--use-rollout-logprobs leaves nothing for --use-tis to correct; give one of them")
        if self.tis_clip_low > self.tis_clip:
            raise ConfigError(f"--tis-clip-low ({self.tis_clip_low}) is greater than --tis-clip ({self.tis_clip})")
        if self.tis_mode != "truncate" and not (self.use_tis or self.get_mismatch_metrics):
            raise ConfigError(f"--tis-mode {self.tis_mode} has no effect without --use-tis; add it")

    def _check_advantages(self) -> None:
        if METHODS[self.advantage_estimator].requires_whitening and not self.normalize_advantages:
            raise ConfigError(f"--advantage-estimator {self.advantage_estimator} requires --normalize-advantages; add it")
        if self.gamma != 1.0 and not METHODS[self.advantage_estimator].discounts:
            raise ConfigError(f"--gamma ({self.gamma}) has no effect on {self.advantage_estimator}; leave it out")
        if self.disable_compute_advantages_and_returns and self.loss_type != "sft_loss":
            raise ConfigError(
                f"--disable-compute-advantages-and-returns is for --loss-type sft_loss; {self.loss_type} needs advantages"
            )

    @property
    def needs_reference(self) -> bool:
        """Tell whether log-probs of the reference are wanted."""
        return self.use_kl_loss or self.kl_coef != 0
