"""What is said before megatron-core is imported, in processes with and without a stand-in for CUDA."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qwench.errors import ConfigError
from qwench.training.megatron.platform import check_transformer_impl
from tests.deadlines import patient
from tests.fakes import cuda_stand_in

_CHECK = """
import torch
from qwench.errors import ConfigError
from qwench.training.megatron.platform import check_platform
try:
    print(check_platform(), torch.cuda.is_available(), torch.zeros(2, device="cuda").device)
except ConfigError as error:
    print("refused:", error)
"""


def _check(environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _CHECK], env=environment, capture_output=True, text=True, timeout=patient(120), check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_user_is_told_what_to_use():
    said = _check(dict(os.environ))
    assert said.startswith("refused: --train-backend megatron needs a GPU")
    assert said.endswith("use --train-backend fsdp.")
    assert "\n" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_child_process_finds_the_stand_in_on_its_path():
    version, available, device = _check(cuda_stand_in.environment(os.environ)).split()
    assert version >= "0.16"
    assert (available, device) == ("False", "cpu")


def test_transformer_impl_is_checked():
    check_transformer_impl("local")
    with pytest.raises(ConfigError, match=r"unknown --transformer-impl 'te'; known: local, transformer_engine\."):
        check_transformer_impl("te")
    with pytest.raises(ConfigError, match="needs Transformer Engine, which is not installed"):
        check_transformer_impl("transformer_engine")
