"""The environment that a trainer process is given before it imports PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

from qwench.config.cluster import ClusterConfig
from qwench.config.training import TrainingConfig

_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def trainer_environment(cluster: ClusterConfig, training: TrainingConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set: those of --train-env-vars, and what --deterministic-mode needs.

    Without a workspace of fixed size, cuBLAS may choose another algorithm in every run, and PyTorch refuses it.
    Source: https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility
    """
    variables = dict(cluster.train_env_vars)
    if training.deterministic_mode and _CUBLAS_WORKSPACE not in {**environ, **variables}:
        variables[_CUBLAS_WORKSPACE] = ":4096:8"
    return variables
