"""Training methods, one a file. A new one is a file here, and its line in `estimators.METHODS`."""

from __future__ import annotations

from importlib import import_module

from qwench.algorithms.method import NO_TERMS, Method, UserTerms
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.estimators import method_name


def build_method(
    section: AlgorithmConfig,
    *,
    opd_kl_coef: float | None = None,
    user_terms: UserTerms = NO_TERMS,
    reward_weights: tuple[float, ...] = (),
) -> Method:
    """Return the method that `--loss-type` and `--advantage-estimator` choose.

    Args:
        opd_kl_coef: weight of the reverse KL to the teacher. None: there is no teacher.
        user_terms: functions of the user in the policy loss.
        reward_weights: of several rewards that a method compares apart. Empty: 1 each.

    Raises:
        ConfigError: there is none of that name.
    """
    name = method_name(section.loss_type, section.advantage_estimator)
    import_module(f".{name}", __name__)  # by name, so that a new method needs no second list
    method = Method.by_name[name](section, opd_kl_coef=opd_kl_coef, user_terms=user_terms)
    method.reward_weights = reward_weights
    return method
