"""A stand-in for CUDA on machines without one, so that megatron-core runs on the CPU in tests.

megatron-core asks torch.cuda for the current device, streams, events and generators, and writes `device="cuda"`. `install`
answers those with the CPU. `torch.cuda.is_available()` stays False, so our own code sees the CPU that is there.

A child process gets it by `environment()`: a folder on its PYTHONPATH has a sitecustomize that installs it after torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.jit._builtins import _register_builtin
from torch.utils._device import _device_constructors

SITE_FOLDER = Path(__file__).with_name("cuda_stand_in_site")
_CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
_INSTALLED = "_qwench_stand_in"


class _Stream:
    """A queue that is always empty: whatever is asked for has happened."""

    cuda_stream = 0

    def __init__(self, *_arguments: object, **_options: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Return at once."""

    def wait_event(self, event: object) -> None:
        """Return at once."""

    def record_event(self, event: object = None) -> _Event:
        """Return an event that has happened."""
        return _Event()

    def synchronize(self) -> None:
        """Return at once."""


class _Event:
    """Something that has happened."""

    def __init__(self, *_arguments: object, **_options: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        """Return at once."""

    def wait(self, stream: object = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return that it has happened."""
        return True

    def elapsed_time(self, end: object) -> float:
        """Return milliseconds until `end`."""
        return 0.0


class _Generators:
    """The generators of all devices: one."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __getitem__(self, index: object) -> torch.Generator:
        return self._generator


def install() -> None:
    """Answer for CUDA in this process; does nothing where CUDA is, or the second time."""
    if torch.cuda.is_available() or hasattr(torch.cuda, _INSTALLED):
        return
    setattr(torch.cuda, _INSTALLED, True)
    _replace_device()
    _replace_generator()
    _device_constructors()  # fills a cache that `with torch.device(...)` compares the functions underneath with
    for name in _FACTORIES:
        stand_in = _on_the_cpu(getattr(torch, name))
        _register_builtin(stand_in, f"aten::{name}")  # so that torch.jit.script still knows it
        setattr(torch, name, stand_in)
    tensor: Any = torch.Tensor
    tensor.to = _on_the_cpu(tensor.to)
    tensor.type = _cuda_names(tensor.type)
    tensor.cuda = lambda self, *_arguments, **_options: self
    tensor.pin_memory = lambda self, *_arguments, **_options: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_arguments, **_options: self


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` with the PYTHONPATH that installs the stand-in in a child process."""
    return dict(base) | {"PYTHONPATH": os.pathsep.join([str(SITE_FOLDER), *filter(None, [base.get("PYTHONPATH")])])}


def _replace_device() -> None:
    """Give torch.cuda one device, which is the CPU, with streams that never wait."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = _nothing_to_enter
    cuda.device = _nothing_to_enter
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = lambda message: 0
    cuda.nvtx.range_pop = lambda: 0


def _replace_generator() -> None:
    """Keep a generator apart from the CPU's own, as a GPU's would be."""
    generator = torch.Generator()
    cuda: Any = torch.cuda
    cuda.default_generators = _Generators(generator)
    cuda._lazy_call = lambda function, **_options: function()
    cuda.manual_seed = cuda.manual_seed_all = generator.manual_seed
    for namespace in (cuda, cuda.random):
        namespace.get_rng_state = lambda device="cuda": generator.get_state()
        namespace.set_rng_state = lambda state, device="cuda": generator.set_state(state) and None


@contextmanager
def _nothing_to_enter(*_arguments: object) -> Iterator[None]:
    yield


def _on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that takes a device, so that "cuda" means the CPU and no memory is pinned."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if "device" in options:
            options["device"] = _real(options["device"])
        options.pop("pin_memory", None)
        return function(*map(_real, arguments), **options)

    return call


def _real(value: Any) -> Any:
    """Return the CPU in the place of a CUDA device, everything else as it is."""
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    return _CPU if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def _cuda_names(type_: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Tensor.type, so that a tensor of the CPU names itself as megatron-core's optimizer expects."""

    @functools.wraps(type_)
    def call(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        named = type_(tensor, *arguments, **options)
        return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) else named

    return call
