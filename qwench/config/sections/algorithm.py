"""The objective: advantages, policy loss, KL and corrections."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from qwench.config.limits import as_flag, check_finite, check_fraction, check_import_path, check_not_negative, check_positive
from qwench.errors import ConfigError
from qwench.estimators import METHODS, check_estimator, method_name, owners_of

KlType = Literal["k1", "k2", "k3", "low_var_kl"]
TisMode = Literal["truncate", "clip", "mask", "icepop"]
RatioLevel = Literal["token", "sequence", "geometric"]
LossType = Literal["policy_loss", "sft_loss", "custom_loss"]


_TIS_CLIP = 2.0
_OPSM_DELTA = 1e-4
_USED_BY_SFT = frozenset({
    "loss_type",
    "calculate_per_token_loss",
    "disable_compute_advantages_and_returns",
    "observe_training_entropy",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgorithmConfig:
    """The method and its constants."""

    advantage_estimator: str = "grpo"
    """RL method: grpo, gspo, cispo, rloo, dr_grpo, sapo, gmpo, gpg, clip_cov, kl_cov, dppo_tv, dppo_kl, maxrl, passk, gdpo,
    ppo, reinforce_plus_plus or reinforce_plus_plus_baseline. It turns rewards into advantages and chooses the policy loss."""
    loss_type: LossType = "policy_loss"
    """policy_loss trains by RL; sft_loss trains on conversations (qwench sft sets it). custom_loss is
    --custom-loss-function-path."""
    calculate_per_token_loss: bool = False
    """Average the loss over all tokens of a step. Off: average over each sample's tokens, then over samples."""
    disable_compute_advantages_and_returns: bool = False
    """Compute no advantages. Accepted with --loss-type sft_loss and custom_loss only."""
    eps_clip: float = 0.2
    """Clip the policy ratio below at 1 - this. gmpo clips its logarithm at - this; dppo_tv and dppo_kl bound the divergence of
    a token by this."""
    eps_clip_high: float | None = None
    """Clip the policy ratio above at 1 + this (clip-higher). None: --eps-clip."""
    eps_clip_c: float | None = None
    """Dual clip: bound the loss of a negative advantage at this factor (> 1) times the advantage. None: off."""
    dr_grpo_length: int | None = None
    """Number by which dr_grpo divides the summed loss of each sample. None: --rollout-max-response-len."""
    sapo_tau_pos: float = 1.0
    """Temperature of SAPO's gate for positive advantages. The gate closes faster at a higher temperature."""
    sapo_tau_neg: float = 1.05
    """Temperature of SAPO's gate for negative advantages."""
    clip_cov_ratio: float = 0.0002
    """Share of the rollout's tokens that clip_cov takes out of the loss."""
    clip_cov_lb: float = 1.0
    """clip_cov takes out tokens with a covariance of log-prob and advantage above this."""
    clip_cov_ub: float = 5.0
    """clip_cov takes out tokens with a covariance of log-prob and advantage below this."""
    kl_cov_ratio: float = 0.0002
    """Share of the rollout's tokens, those of the highest covariance, on which kl_cov adds its KL penalty."""
    kl_cov_coef: float = 1.0
    """Weight of the KL penalty of kl_cov."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference inside the advantages. For ppo and the two REINFORCE++ methods; the others use
    --kl-loss-coef."""
    use_kl_loss: bool = False
    """Add the KL to the reference to the loss with weight --kl-loss-coef. Loads the reference even at weight 0, for metrics."""
    kl_loss_coef: float = 0.0
    """Weight of the KL term of the loss. Needs --use-kl-loss."""
    kl_loss_type: KlType = "k1"
    """KL estimator: k1 (log-ratio), k2 (half its square), k3 or low_var_kl (unbiased, low variance)."""
    use_unbiased_kl: bool = False
    """Multiply the KL term by the policy ratio, which makes its gradient unbiased. Needs --use-kl-loss."""
    ref_update_interval: int | None = None
    """Copy the policy into the reference after every this many rollouts. None: the reference never changes."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the loss."""
    observe_training_entropy: bool = False
    """Compute and log the policy's entropy when --entropy-coef is 0, too."""
    use_rollout_entropy: bool = False
    """Compute the policy's entropy at every token before the first step of a rollout, and log it. Functions of the user, custom
    losses and --save-debug-train-data get it."""
    disable_rewards_normalization: bool = False
    """Use raw rewards as advantages: do not subtract the group's mean."""
    disable_grpo_std_normalization: bool = False
    """Do not divide rewards by the group's standard deviation. Groups of one sample are never divided."""
    normalize_advantages: bool = False
    """Whiten advantages over all tokens of the rollout. The two REINFORCE++ methods require it."""
    gamma: float = 1.0
    """Discount per token, 0 < gamma <= 1 (reinforce_plus_plus, ppo)."""
    lambd: float = 1.0
    """Decay of GAE's sum over later tokens, 0 <= lambd <= 1 (ppo)."""
    value_clip: float = 0.2
    """Distance from its old value at which the loss clips a value (ppo)."""
    use_tis: bool = False
    """Correct the loss for the gap between engine and trainer log-probs by truncated importance sampling."""
    tis_mode: TisMode = "truncate"
    """What happens to importance weights out of bounds. truncate moves them to --tis-clip-low or --tis-clip, and icepop sets
    them to 0. With the bounds --tis-lower-bound and --tis-clip, clip moves them and mask takes tokens out of the loss."""
    tis_level: RatioLevel = "token"
    """Importance weight of a token: its own ratio, the product of its sequence's ratios (sequence), or their geometric mean
    (geometric)."""
    tis_clip: float = _TIS_CLIP
    """Upper bound of the importance weight of --use-tis."""
    tis_clip_low: float = 0.0
    """Lower bound of the importance weight for --tis-mode truncate and icepop."""
    tis_lower_bound: float | None = None
    """Lower bound of the importance weight for --tis-mode clip and mask, and of --use-rs. None: 1 / --tis-clip."""
    tis_batch_normalize: bool = False
    """Divide the bounded importance weights of --use-tis by their mean over the step."""
    use_rs: bool = False
    """Rejection: take tokens out of the loss whose ratio of trainer and engine probability is out of bounds. The divisors of
    the loss stay."""
    rs_level: RatioLevel = "token"
    """Ratio that --use-rs compares: of the token, the product over its sequence, or the geometric mean over it."""
    rs_lower_bound: float | None = None
    """Lower bound of --use-rs. None: --tis-lower-bound."""
    rs_upper_bound: float | None = None
    """Upper bound of --use-rs. None: --tis-clip."""
    rs_veto_threshold: float | None = None
    """--use-rs takes a whole sequence out of the loss that has a token with a smaller ratio. None: no such veto."""
    use_rollout_logprobs: bool = False
    """Use the engine's log-probs as the old policy's. Saves one forward pass of the trainer for each rollout."""
    keep_old_actor: bool = False
    """Score old log-probs by the weights that sampled each token, which wait on the host, in place of the policy's own. Only
    generation ahead of training (--rollouts-ahead, --fully-async, --update-weights-interval) has such weights."""
    skip_actor_forward_only: bool = False
    """Make no pass for the old log-probs: use those of the step itself. Needs one step for each rollout."""
    get_mismatch_metrics: bool = False
    """Log the gap between engine and trainer log-probs, without a correction."""
    use_opsm: bool = False
    """Off-policy sequence masking: drop sequences with a negative advantage and a mean log-ratio above --opsm-delta."""
    opsm_delta: float = _OPSM_DELTA
    """Mean log-ratio above which --use-opsm drops a sequence."""

    custom_tis_function_path: str | None = None
    """Function that corrects the policy loss for the gap between engine and trainer, in place of --use-tis' own weights. Needs
    --use-tis or --get-mismatch-metrics. Called as fn(loss, trainer_log_probs, rollout_log_probs, micro_batch)."""
    custom_pg_loss_reducer_function_path: str | None = None
    """Function that sums the policy loss of a micro-batch, fn(loss, kept, micro_batch). The sum over a step is divided by its
    executions, with --calculate-per-token-loss by its tokens."""
    custom_loss_function_path: str | None = None
    """Loss of --loss-type custom_loss: fn(log_probs, entropy, micro_batch) -> TokenLoss, or slime's form with logits."""

    def __post_init__(self) -> None:
        check_import_path("--custom-tis-function-path", self.custom_tis_function_path)
        check_import_path("--custom-pg-loss-reducer-function-path", self.custom_pg_loss_reducer_function_path)
        check_import_path("--custom-loss-function-path", self.custom_loss_function_path)
        check_estimator(self.advantage_estimator)
        for flag, value in (
            ("--eps-clip", self.eps_clip),
            ("--eps-clip-high", self.eps_clip_high),
            ("--tis-clip", self.tis_clip),
            ("--tis-lower-bound", self.tis_lower_bound),
            ("--rs-lower-bound", self.rs_lower_bound),
            ("--rs-upper-bound", self.rs_upper_bound),
            ("--rs-veto-threshold", self.rs_veto_threshold),
            ("--ref-update-interval", self.ref_update_interval),
            ("--dr-grpo-length", self.dr_grpo_length),
            ("--value-clip", self.value_clip),
            ("--sapo-tau-pos", self.sapo_tau_pos),
            ("--sapo-tau-neg", self.sapo_tau_neg),
        ):
            check_positive(flag, value)
        for flag, coefficient in (
            ("--kl-coef", self.kl_coef),
            ("--kl-loss-coef", self.kl_loss_coef),
            ("--tis-clip-low", self.tis_clip_low),
            ("--kl-cov-coef", self.kl_cov_coef),
            ("--lambd", self.lambd),
        ):
            check_not_negative(flag, coefficient)
        for flag, share in (
            ("--gamma", self.gamma),
            ("--clip-cov-ratio", self.clip_cov_ratio),
            ("--kl-cov-ratio", self.kl_cov_ratio),
        ):
            check_fraction(flag, share)
        for flag, number in (
            ("--entropy-coef", self.entropy_coef),
            ("--eps-clip-c", self.eps_clip_c),
            ("--opsm-delta", self.opsm_delta),
            ("--clip-cov-lb", self.clip_cov_lb),
            ("--clip-cov-ub", self.clip_cov_ub),
        ):
            check_finite(flag, number)
        if self.lambd > 1:
            raise ConfigError(f"--lambd must be at most 1, got {self.lambd}")
        self._check_fine_tuning()
        self._check_custom_loss()
        self._check_options()
        self._check_clipping()
        self._check_kl()
        self._check_corrections()
        self._check_advantages()

    def _check_fine_tuning(self) -> None:
        if self.loss_type != "sft_loss":
            return
        for item in fields(self):
            if getattr(self, item.name) != item.default and item.name not in _USED_BY_SFT:
                flag = as_flag(item.name)
                raise ConfigError(f"{flag} has no effect with --loss-type sft_loss, which trains without rewards; leave it out")

    def _check_custom_loss(self) -> None:
        path = self.custom_loss_function_path
        if (self.loss_type == "custom_loss") != (path is not None):
            lone, other = ("--custom-loss-function-path", "--loss-type custom_loss")[:: 1 if path is not None else -1]
            raise ConfigError(f"{lone} has no effect without {other}; give both")
        if path is None:
            return
        if self.has_critic:
            raise ConfigError("--loss-type custom_loss trains no critic; choose another estimator than ppo")
        for flag, given in (
            ("--custom-tis-function-path", self.custom_tis_function_path is not None),
            ("--custom-pg-loss-reducer-function-path", self.custom_pg_loss_reducer_function_path is not None),
            ("--use-tis", self.use_tis),
            ("--use-rs", self.use_rs),
            ("--use-opsm", self.use_opsm),
            ("--skip-actor-forward-only", self.skip_actor_forward_only),
        ):
            if given:
                raise ConfigError(f"{flag} has no effect with --loss-type custom_loss, which is the whole loss; leave it out")

    def _check_options(self) -> None:
        facts = METHODS[self.advantage_estimator]
        for item in fields(self):
            owners, value = owners_of(item.name), getattr(self, item.name)
            if owners and item.name not in facts.options and value != item.default:
                flag = as_flag(item.name)
                raise ConfigError(
                    f"{flag} ({value}) has no effect with --advantage-estimator {self.advantage_estimator}; "
                    f"it is an option of {' and '.join(owners)}"
                )
        if self.clip_cov_lb >= self.clip_cov_ub:
            raise ConfigError(f"--clip-cov-lb ({self.clip_cov_lb}) must be less than --clip-cov-ub ({self.clip_cov_ub})")
        if self.calculate_per_token_loss and not facts.reduces:
            raise ConfigError(
                f"--calculate-per-token-loss has no effect with --advantage-estimator {self.advantage_estimator}, "
                "which divides by --dr-grpo-length; leave it out"
            )

    def _check_clipping(self) -> None:
        name, facts = self.advantage_estimator, METHODS[self.advantage_estimator]
        for flag, value, default in (("--eps-clip", self.eps_clip, 0.2), ("--eps-clip-high", self.eps_clip_high, None)):
            if not facts.clips and value != default:
                raise ConfigError(f"{flag} ({value}) has no effect on {name}, which does not clip; leave it out")
        if facts.clips_loss and self.eps_clip >= 1:
            raise ConfigError(f"--eps-clip must be less than 1, got {self.eps_clip}: {name} clips ratios at 1 - this")
        if not facts.clips_loss and self.eps_clip_c is not None:
            raise ConfigError(f"--eps-clip-c ({self.eps_clip_c}) has no effect on {name}, which does not clip losses")
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
        for flag, given in (("--use-tis", self.use_tis), ("--use-rs", self.use_rs)):
            if given and self.use_rollout_logprobs:
                raise ConfigError(f"--use-rollout-logprobs leaves nothing for {flag} to correct; give one of them")
        if self.tis_clip_low > self.tis_clip:
            raise ConfigError(f"--tis-clip-low ({self.tis_clip_low}) is greater than --tis-clip ({self.tis_clip})")
        own_low = self.tis_mode in ("clip", "mask")
        if self.custom_tis_function_path is not None and not (self.use_tis or self.get_mismatch_metrics):
            raise ConfigError("--custom-tis-function-path has no effect without --use-tis or --get-mismatch-metrics; add one")
        if self.custom_tis_function_path is not None and self.tis_batch_normalize:
            raise ConfigError(
                "--custom-tis-function-path computes the weights that --tis-batch-normalize divides; leave one out"
            )
        if self.custom_pg_loss_reducer_function_path is not None and not METHODS[self.advantage_estimator].reduces:
            raise ConfigError(
                f"--custom-pg-loss-reducer-function-path has no effect with --advantage-estimator {self.advantage_estimator}, "
                "which divides by --dr-grpo-length; leave one of them out"
            )
        weighs, rejects = self.use_tis or self.get_mismatch_metrics, self.use_rs
        for flag, value, default, has_effect, needed in (
            ("--tis-mode", self.tis_mode, "truncate", weighs, "--use-tis"),
            ("--tis-level", self.tis_level, "token", weighs, "--use-tis"),
            ("--tis-clip", self.tis_clip, _TIS_CLIP, weighs or rejects, "--use-tis"),
            ("--tis-clip-low", self.tis_clip_low, 0.0, weighs and not own_low, "--use-tis and --tis-mode truncate or icepop"),
            ("--tis-lower-bound", self.tis_lower_bound, None, (weighs and own_low) or rejects, "--tis-mode clip or mask"),
            ("--tis-batch-normalize", self.tis_batch_normalize, False, self.use_tis, "--use-tis"),
            ("--rs-level", self.rs_level, "token", rejects, "--use-rs"),
            ("--rs-lower-bound", self.rs_lower_bound, None, rejects, "--use-rs"),
            ("--rs-upper-bound", self.rs_upper_bound, None, rejects, "--use-rs"),
            ("--rs-veto-threshold", self.rs_veto_threshold, None, rejects, "--use-rs"),
        ):
            if value != default and not has_effect:
                raise ConfigError(f"{flag} {value} has no effect without {needed}; add it")
        for flag, given in (("--kl-coef", self.kl_coef != 0), ("--tis-batch-normalize", self.tis_batch_normalize)):
            if given and self.skip_actor_forward_only:
                raise ConfigError(f"{flag} needs the old log-probs that --skip-actor-forward-only leaves out; give one of them")
        if self.tis_batch_normalize and self.tis_level == "geometric":
            raise ConfigError("--tis-batch-normalize has no mean for --tis-level geometric; give token or sequence")
        for low_flag, high_flag, (low, high) in (
            ("--tis-lower-bound", "--tis-clip", self.tis_bounds),
            ("--rs-lower-bound", "--rs-upper-bound", self.rs_bounds),
        ):
            if low >= high and (own_low or rejects):
                raise ConfigError(f"{low_flag} ({low:g}) must be less than {high_flag} ({high:g})")
        if self.opsm_delta != _OPSM_DELTA and not self.use_opsm:
            raise ConfigError(f"--opsm-delta {self.opsm_delta} has no effect without --use-opsm; add it")

    def _check_advantages(self) -> None:
        method = METHODS[self.advantage_estimator]
        for flag, given, has_effect in (
            ("--disable-rewards-normalization", self.disable_rewards_normalization, method.compares_groups),
            ("--disable-grpo-std-normalization", self.disable_grpo_std_normalization, method.divides_by_std),
        ):
            if given and not has_effect:
                raise ConfigError(f"{flag} has no effect on {self.advantage_estimator}, which does not do it; leave it out")
        if method.requires_whitening and not self.normalize_advantages:
            raise ConfigError(f"--advantage-estimator {self.advantage_estimator} requires --normalize-advantages; add it")
        if self.gamma != 1.0 and not method.discounts:
            raise ConfigError(f"--gamma ({self.gamma}) has no effect on {self.advantage_estimator}; leave it out")
        if self.disable_compute_advantages_and_returns and self.loss_type == "policy_loss":
            raise ConfigError(
                "--disable-compute-advantages-and-returns is for --loss-type sft_loss or custom_loss; policy_loss needs them"
            )

    @property
    def takes_entropy(self) -> bool:
        """Tell whether the loss, or a metric of it, takes the entropy of every trained token."""
        return self.entropy_coef != 0 or self.observe_training_entropy

    @property
    def has_critic(self) -> bool:
        """Tell whether the method trains a critic."""
        return METHODS[method_name(self.loss_type, self.advantage_estimator)].critic

    @property
    def needs_reference(self) -> bool:
        """Tell whether the method uses log-probs of the reference."""
        method = METHODS[method_name(self.loss_type, self.advantage_estimator)]
        return method.needs_reference(use_kl_loss=self.use_kl_loss, kl_coef=self.kl_coef)

    @property
    def tis_bounds(self) -> tuple[float, float]:
        """Return the bounds of the importance weight."""
        return self._lower_bound if self.tis_mode in ("clip", "mask") else self.tis_clip_low, self.tis_clip

    @property
    def rs_bounds(self) -> tuple[float, float]:
        """Return the bounds within which --use-rs keeps a token."""
        low = self._lower_bound if self.rs_lower_bound is None else self.rs_lower_bound
        return low, self.tis_clip if self.rs_upper_bound is None else self.rs_upper_bound

    @property
    def _lower_bound(self) -> float:
        return 1 / self.tis_clip if self.tis_lower_bound is None else self.tis_lower_bound
