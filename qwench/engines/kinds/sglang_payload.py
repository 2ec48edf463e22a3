"""The form in which SGLang takes a bucket from another process of the machine.

`/update_weights_from_tensor` with `load_format: flattened_bucket` wants, for each tensor-parallel rank, the base64 of a pickle
of `{"flattened_tensor": <shared tensor>, "metadata": [<name, shape, dtype, start_idx, end_idx, numel>, ...]}`. We write such
pickles for SGLang and never read one. Only globals that SGLang's unpickler allows occur in them.

Source: SGLang 0.5.16, srt/weight_sync/tensor_bucket.py, srt/utils/{common,patch_torch}.py.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from qwench.wire.addresses import device_name
from qwench.wire.flat_bucket import TensorEntry, size_bytes
from qwench.wire.shared_buffer import SharedBuffer

_DEVICE_ARGUMENT = 6
"""Place of the device's number in the arguments of `rebuild_cuda_tensor`."""


def flattened_bucket_payload(buffer: SharedBuffer, entries: Sequence[TensorEntry]) -> str:
    """Return what one tensor-parallel rank unpickles, once; `buffer` must live and stay as it is until that has answered."""
    metadata = [
        # SGLang only reads these attributes; its own class would need SGLang here.
        SimpleNamespace(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=entry.torch_dtype,
            start_idx=entry.start,
            end_idx=entry.end,
            numel=entry.end - entry.start,
        )
        for entry in entries
    ]
    buffer.wait_for_writes()
    content = io.BytesIO()
    _Pickler(content, buffer.file).dump({"flattened_tensor": buffer.tensor[: size_bytes(entries)], "metadata": metadata})
    return b64encode(content.getvalue()).decode()


class _Pickler(ForkingPickler):
    """Writes the buffer as a reference: a GPU by its UUID, as SGLang's processes may number it otherwise; or a file's name."""

    def __init__(self, content: io.BytesIO, file: Path | None) -> None:
        super().__init__(content)
        self._file = file

    def reducer_override(self, value: object) -> Any:  # pickle's protocol allows several types
        if not isinstance(value, Tensor):
            return NotImplemented
        if self._file is not None:
            return partial(torch.from_file, dtype=value.dtype), (str(self._file), True, value.numel())
        rebuild, arguments = reduce_tensor(value)
        named = list(arguments)
        named[_DEVICE_ARGUMENT] = device_name(value.device)
        return rebuild, tuple(named)
