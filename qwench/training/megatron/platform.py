"""Checks before megatron-core is imported: packages and a GPU. This module does not import it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from qwench.errors import ConfigError


def check_platform() -> str:
    """Make sure that `--train-backend megatron` can work in this process, and return the version of megatron-core.

    Raises:
        ConfigError: megatron-core is not installed, or there is no GPU for it.
    """
    installed = megatron_version()
    if installed is None:
        raise ConfigError(
            "--train-backend megatron needs megatron-core, which is not installed; pip install 'qwench[megatron]', or use "
            "--train-backend fsdp."
        )
    try:
        torch.cuda.current_device()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--train-backend megatron needs a GPU, because megatron-core {installed} calls torch.cuda throughout, but torch "
            f"finds none ({str(error).splitlines()[0]}); use --train-backend fsdp."
        ) from error
    return installed


def megatron_version() -> str | None:
    """Return the installed version of megatron-core; None when there is none."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return None


def check_transformer_impl(transformer_impl: str) -> None:
    """Make sure that the layers `--transformer-impl` asks for can be built.

    Raises:
        ConfigError: the name is unknown, or Transformer Engine is not installed.
    """
    if transformer_impl not in ("local", "transformer_engine"):
        raise ConfigError(f"unknown --transformer-impl {transformer_impl!r}; known: local, transformer_engine.")
    if transformer_impl == "transformer_engine" and find_spec("transformer_engine") is None:
        raise ConfigError(
            "--transformer-impl transformer_engine needs Transformer Engine, which is not installed; install "
            "transformer-engine[pytorch], or use --transformer-impl local, which needs nothing more."
        )
