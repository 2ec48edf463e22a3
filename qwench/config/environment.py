"""The environment that a trainer process is given before it imports PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.training import TrainingConfig


def trainer_environment(
    cluster: ClusterConfig, parallel: ParallelConfig, training: TrainingConfig, environ: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables to set: those of --train-env-vars, and what the flags need unless `environ` says otherwise.

    Without a workspace of fixed size, cuBLAS may choose another algorithm in every run, and PyTorch refuses it.
    With one hardware queue, a tensor-parallel collective starts before the matrix product that hides it, not after it.
    Sources: https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility; megatron-core, tensor_parallel/layers.py
    """
    needed = {}
    if training.deterministic_mode:
        needed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if parallel.tensor_model_parallel_size > 1:
        needed["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return {**{name: value for name, value in needed.items() if name not in environ}, **cluster.train_env_vars}


def engine_environment(environ: Mapping[str, str], trainers: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without the trainer's variables, which an engine server must not inherit."""
    return {name: value for name, value in environ.items() if trainers.get(name) != value}
