"""A stand-in for the package nvidia-cudnn-frontend: its graphs attend on the CPU to what their tensors say lies in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = SimpleNamespace(BFLOAT16=torch.bfloat16, FLOAT=torch.float32, INT32=torch.int32, INT64=torch.int64)
ALIGNMENT = SimpleNamespace(TOP_LEFT="top left")
HEURISTICS = SimpleNamespace(A="a", FALLBACK="fallback")


class Described:
    """What a graph says of a tensor; `at` reads it."""

    rows: Described | None = None
    is_output = False

    def set(self, name: str) -> Callable[[Any], Described]:
        """Return the setter of one property."""

        def setter(value: Any) -> Described:
            setattr(self, name, value)
            return self

        return setter

    def __getattr__(self, name: str) -> Any:
        known = {"set_uid": "uid", "set_dim": "dim", "set_stride": "stride", "set_data_type": "dtype"}
        known |= {"set_output": "is_output", "set_ragged_offset": "rows"}
        if name not in known:
            raise AttributeError(name)
        return self.set(known[name])

    def at(self, memory: dict[int, Tensor], sequence: int, length: int) -> Tensor:
        """Return [heads, length, last dimension] of a sequence in the memory that an execution brings."""
        tensor, offset = memory[self.uid], sequence * self.stride[0]
        assert tensor.dtype == self.dtype and length <= self.dim[2]
        if self.rows is None:
            assert list(tensor.shape) == self.dim and list(tensor.stride()) == self.stride
        else:
            assert len(memory[self.rows.uid]) == self.dim[0] + 1 == self.rows.dim[0]
            offset = int(memory[self.rows.uid][sequence])
        shape = (self.dim[1], length, self.dim[3])
        return tensor.as_strided(shape, self.stride[1:], tensor.storage_offset() + offset)


class Graph:
    """Forward or backward attention."""

    def __init__(self, *, handle: str, io_data_type: Any, intermediate_data_type: Any, compute_data_type: Any) -> None:
        assert handle == "handle"
        assert (io_data_type, intermediate_data_type, compute_data_type) == (torch.bfloat16, torch.float32, torch.float32)
        self.calls: list[object] = []

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: Any, uid: int) -> Described:
        made = Described()
        made.uid, made.dim, made.stride, made.dtype = uid, dim, stride, data_type
        return made

    def sdpa(self, *, name: str, generate_stats: bool, **options: Any) -> tuple[Described, Described]:
        assert generate_stats
        self.options, self.outputs = options, {"o": Described(), "stats": Described()}
        return self.outputs["o"], self.outputs["stats"]

    def sdpa_backward(self, *, name: str, **options: Any) -> tuple[Described, Described, Described]:
        self.options, self.outputs = options, {name: Described() for name in ("dq", "dk", "dv")}
        return self.outputs["dq"], self.outputs["dk"], self.outputs["dv"]

    def __getattr__(self, name: str) -> Any:
        if name not in ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"):
            raise AttributeError(name)
        return lambda *given: self.calls.append((name, *given))

    def get_workspace_size(self) -> int:
        return 77 if "o" in self.outputs else 0

    def execute(self, memory: dict[int, Tensor], workspace: Tensor, *, handle: str) -> None:
        """Compute each sequence by itself."""
        assert handle == "handle" and workspace.dtype == torch.uint8
        assert len(workspace) == (77 if "o" in self.outputs else 1), "an empty tensor has no address"
        options = self.options
        lengths = memory[options["seq_len_q"].uid]
        assert options["use_padding_mask"] and options["seq_len_kv"] is options["seq_len_q"]
        assert lengths.dtype == torch.int32 and len(lengths) == options["q"].dim[0]
        assert options["diagonal_alignment"] == ALIGNMENT.TOP_LEFT and all(one.is_output for one in self.outputs.values())
        for sequence, length in enumerate(lengths.tolist()):
            if length:
                self._attend(options, memory, sequence, length)

    def _attend(self, options: dict[str, Any], memory: dict[int, Tensor], sequence: int, length: int) -> None:
        given = {
            name: one.at(memory, sequence, length).float()
            for name, one in options.items()
            if name in ("q", "k", "v", "o", "dO", "stats")
        }
        q, k, v = given["q"], given["k"], given["v"]
        group = len(q) // len(k)
        k, v = (one.repeat_interleave(group, dim=0) for one in (k, v))
        place = torch.arange(length)
        unseen = place - place[:, None] > options["diagonal_band_right_bound"]
        scores = (q @ k.mT * options["attn_scale"]).masked_fill(unseen, float("-inf"))
        if "dO" not in given:
            found = {"o": scores.softmax(-1) @ v, "stats": scores.logsumexp(-1, keepdim=True)}
        else:
            weights = (scores - given["stats"]).exp()
            rows = (given["dO"] * given["o"]).sum(-1, keepdim=True)
            slopes = weights * (given["dO"] @ v.mT - rows) * options["attn_scale"]
            found = {
                "dq": slopes @ k,
                "dk": _per_group(slopes.mT @ q, group),
                "dv": _per_group(weights.mT @ given["dO"], group),
            }
        for name, output in self.outputs.items():
            output.at(memory, sequence, length).copy_(found[name])


def _per_group(tensor: Tensor, group: int) -> Tensor:
    return tensor.unflatten(0, (-1, group)).sum(1)


def install(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Let `import cudnn` find the stand-in, for one device with a stream; return the graphs that are made."""
    graphs, module = list[Graph](), ModuleType("cudnn")

    def pygraph(**options: Any) -> Graph:
        graphs.append(Graph(**options))
        return graphs[-1]

    def set_stream(*, handle: str, stream: int) -> None:
        assert (handle, stream) == ("handle", 7)

    module.__spec__ = ModuleSpec("cudnn", None)
    names = {"data_type": DTYPES, "diagonal_alignment": ALIGNMENT, "heur_mode": HEURISTICS}
    vars(module).update(names, pygraph=pygraph, set_stream=set_stream, create_handle=lambda: "handle")
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return graphs
