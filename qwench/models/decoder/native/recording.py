"""The kernel calls of a computation, recorded once and made again over the same tensors, as CUDA graphs do on a GPU.

Between two calls into the kernels a model's code makes tensors, views and arguments, which takes longer than a small kernel.
Few operations of PyTorch may stand between the calls: views, and those whose result is copied to where the recorded one
lies: `_REPEATED`, and casts and reshapes that are no views. Any other makes a recording useless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CACHE_BYTES = 2**22
"""Of the tensors that a recording keeps. It uses none of them twice, so larger ones would leave the processor's caches."""
_active: ContextVar[Recording | None] = ContextVar("recording", default=None)
_aten = torch.ops.aten
_MADE = {_aten.empty.memory_format, _aten.empty_like.default}
_REPEATED = {_aten.embedding.default, _aten.linear.default, _aten.mm.default, _aten.addmm.default}


def current() -> Recording | None:
    """Return the recording that this thread's calls belong to, if one is being made."""
    return _active.get()


class Recording(TorchDispatchMode):
    """Records what is computed in its `with` block, in one thread; see the module."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_complete = True
        """False once an operation came that cannot be recorded, or the tensors became too large."""
        self._calls: list[tuple[Callable[..., object], Sequence[object]]] = []
        self._kept: list[Tensor] = []
        self._num_bytes = 0

    def __enter__(self) -> Recording:
        self._token = _active.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        _active.reset(self._token)

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function of the library, now and in `play`."""
        function(*arguments)
        self._add(function, arguments)

    def play(self) -> None:
        """Make the calls again; what they read must lie where it lay."""
        for function, arguments in self._calls:
            function(*arguments)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation of PyTorch, and note what it means for the recording."""
        result = func(*args, **(kwargs or {}))
        if func in _MADE:
            self._keep(result)
        elif func in _REPEATED or (func.is_view and isinstance(result, Tensor) and not _shares(result, args)):
            self._keep(result)
            self._add(_repeat, (result, func, args, kwargs or {}))
        elif not func.is_view:
            self._give_up()
        return result

    def _keep(self, tensor: Tensor) -> None:
        self._num_bytes += tensor.nbytes
        self._kept.append(tensor)
        if self._num_bytes > CACHE_BYTES:
            self._give_up()

    def _add(self, function: Callable[..., object], arguments: Sequence[object]) -> None:
        if self.is_complete:
            self._calls.append((function, arguments))

    def _give_up(self) -> None:
        self.is_complete = False
        self._calls.clear()
        self._kept.clear()


def _repeat(result: Tensor, func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    result.copy_(func(*args, **kwargs))


def _shares(result: Tensor, args: Sequence[Any]) -> bool:
    """Tell whether the result lies in the memory of an argument: `to` and `reshape` make views only where they can."""
    place = result.untyped_storage().data_ptr()
    return any(isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() == place for arg in args)
