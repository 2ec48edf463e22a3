"""Training methods, one a file. A new one is a file here, and its line in `estimators.METHODS`."""

from __future__ import annotations

from importlib import import_module

from qwench.algorithms.method import Method
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.estimators import method_name


def build_method(section: AlgorithmConfig, *, opd_kl_coef: float | None = None) -> Method:
    """Return the method that `--loss-type` and `--advantage-estimator` choose.

    Args:
        opd_kl_coef: weight of the reverse KL to the teacher. None: there is no teacher.

    Raises:
        ConfigError: there is none of that name.
    """
    name = method_name(section.loss_type, section.advantage_estimator)
    import_module(f".{name}", __name__)  # by name, so that a new method needs no second list
    return Method.by_name[name](section, opd_kl_coef=opd_kl_coef)
