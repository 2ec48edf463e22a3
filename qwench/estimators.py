"""Training methods by name, and the facts that flags are checked against. Imports without torch.

A method's advantages and loss are in `algorithms/methods/<name>.py`. Its line in `METHODS` registers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodFacts:
    """Which flags have an effect on a method."""

    policy_gradient: bool = True
    """Learns from sampled and graded responses. False: flags of rewards, KL, clipping and engine log-probs have no effect."""
    compares_groups: bool = True
    """Rewards are compared within their group (`--disable-rewards-normalization`)."""
    divides_by_std: bool = False
    """Rewards are divided by their group's standard deviation (`--disable-grpo-std-normalization`)."""
    token_kl: bool = False
    """The KL of a token enters its advantage (`--kl-coef`)."""
    discounts: bool = False
    """Rewards are discounted for each token (`--gamma`)."""
    requires_whitening: bool = False
    """`--normalize-advantages` is part of the method."""
    critic: bool = False
    """A critic is trained beside the policy."""
    clips: bool = True
    """`--eps-clip` and `--eps-clip-high` bound something."""
    clips_loss: bool = True
    """They bound the ratio in the loss. False: `--eps-clip-c` has no effect, `--eps-clip` may be 1 or more."""
    reduces: bool = True
    """`--calculate-per-token-loss` chooses how the loss is averaged. False: the method says it."""
    options: tuple[str, ...] = ()
    """Fields of the section that only this method and its kin read."""

    def needs_reference(self, *, use_kl_loss: bool, kl_coef: float) -> bool:
        """Tell whether log-probs of the reference are used."""
        return self.policy_gradient and (use_kl_loss or (self.token_kl and kl_coef != 0))


METHODS: Mapping[str, MethodFacts] = {
    "grpo": MethodFacts(divides_by_std=True),
    "gspo": MethodFacts(divides_by_std=True),
    "cispo": MethodFacts(divides_by_std=True, clips_loss=False),
    "reinforce_plus_plus": MethodFacts(compares_groups=False, token_kl=True, discounts=True, requires_whitening=True),
    "reinforce_plus_plus_baseline": MethodFacts(token_kl=True, requires_whitening=True),
    "rloo": MethodFacts(),
    "dr_grpo": MethodFacts(reduces=False, options=("dr_grpo_length",)),
    "sapo": MethodFacts(divides_by_std=True, clips=False, clips_loss=False, options=("sapo_tau_pos", "sapo_tau_neg")),
    "gmpo": MethodFacts(divides_by_std=True, clips_loss=False),
    "gpg": MethodFacts(clips=False, clips_loss=False),
    "clip_cov": MethodFacts(divides_by_std=True, options=("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub")),
    "kl_cov": MethodFacts(divides_by_std=True, clips=False, clips_loss=False, options=("kl_cov_ratio", "kl_cov_coef")),
    "dppo_tv": MethodFacts(divides_by_std=True, clips_loss=False),
    "dppo_kl": MethodFacts(divides_by_std=True, clips_loss=False),
    "maxrl": MethodFacts(),
    "passk": MethodFacts(divides_by_std=True),
    "gdpo": MethodFacts(divides_by_std=True),
    "ppo": MethodFacts(compares_groups=False, token_kl=True, discounts=True, critic=True, options=("lambd", "value_clip")),
    "sft": MethodFacts(policy_gradient=False, compares_groups=False),
}


def estimator_names() -> list[str]:
    """Return what `--advantage-estimator` accepts."""
    return [name for name, facts in METHODS.items() if facts.policy_gradient]


def owners_of(option: str) -> list[str]:
    """Return the methods that read a field of `MethodFacts.options`."""
    return [name for name, facts in METHODS.items() if option in facts.options]


def check_estimator(name: str) -> None:
    """Check the value of `--advantage-estimator`.

    Raises:
        ConfigError: no method has this name.
    """
    known = ", ".join(estimator_names())
    if name not in estimator_names():
        raise ConfigError(f"unknown --advantage-estimator {name!r}; known: {known}.")


def method_name(loss_type: str, advantage_estimator: str) -> str:
    """Return the method that `--loss-type` and `--advantage-estimator` choose together.

    Raises:
        ConfigError: nothing can be trained with this loss.
    """
    if loss_type in ("policy_loss", "custom_loss"):
        check_estimator(advantage_estimator)
        return advantage_estimator
    if loss_type == "sft_loss":
        return "sft"
    raise ConfigError(f"--loss-type {loss_type!r} cannot be trained; known: policy_loss, sft_loss, custom_loss.")
