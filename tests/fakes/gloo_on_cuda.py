"""Lets two gloo ranks share one GPU: gloo gathers CUDA tensors, but its coalesced gather (torch 2.11) is a segmentation fault.

Inside, megatron-core's coalesced collectives are called one by one, which is the same data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from megatron.core.distributed import param_and_grad_buffer


def install() -> None:
    """Take the coalescing out of megatron-core's buffers in this process."""
    param_and_grad_buffer._coalescing_manager = _one_by_one


@contextmanager
def _one_by_one(*_arguments: Any, **_options: Any) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(wait=lambda: None)
