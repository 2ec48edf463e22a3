"""The environments of trainer processes and of the processes that a run starts."""

from __future__ import annotations

from collections.abc import Mapping

from qwench.config.config import Config

TOKEN_VARIABLE = "QWENCH_TOKEN"
"""Holds the token of engine servers."""
JUDGE_KEY_VARIABLE = "QWENCH_JUDGE_KEY"
"""Holds the key that the server of --judge-url wants."""
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""With these variables a process would join the trainer's ranks. torchrun's other variables begin with the prefix below."""
_TORCHRUN_PREFIX = "TORCHELASTIC_"


def trainer_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set: those of --train-env-vars, and what the flags need unless `environ` says otherwise.

    Without a workspace of fixed size, cuBLAS may choose another algorithm in every run, and PyTorch refuses it.
    With one hardware queue, a tensor-parallel collective starts before the matrix product that hides it, not after it.
    Two processes whose NCCL allocates differently cannot open each other's buffers ("invalid argument").
    Sources: https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility; megatron-core, tensor_parallel/layers.py;
    SGLang 0.5.16, srt/entrypoints/engine.py, which sets NCCL_CUMEM_ENABLE to 0 unless it is set
    """
    needed = {}
    if config.training.deterministic_mode:
        needed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if config.parallel.tensor_model_parallel_size > 1:
        needed["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if config.engine.facts.nccl_without_cumem:
        needed["NCCL_CUMEM_ENABLE"] = "0"
    return {**{name: value for name, value in needed.items() if name not in environ}, **config.cluster.train_env_vars}


def engine_environment(environ: Mapping[str, str], trainers: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without the trainer's variables, which an engine server must not inherit."""
    return {name: value for name, value in environ.items() if trainers.get(name) != value}


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without what makes a process a rank of the trainer."""
    return {name: text for name, text in environ.items() if name not in _OF_A_RANK and not name.startswith(_TORCHRUN_PREFIX)}


def reward_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the user's reward function: the user's variables, without ours.

    A function may need keys of services. It needs no place among the ranks and no access to the engines or the judge.
    """
    return {name: text for name, text in without_rank(environ).items() if name not in (TOKEN_VARIABLE, JUDGE_KEY_VARIABLE)}
