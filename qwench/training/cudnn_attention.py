"""cuDNN's attention over packed sequences, forward and backward; needs the package nvidia-cudnn-frontend.

On an H100 it is 1.7 times as fast as FlashAttention 2, which is what torch's `varlen_attn` calls. A plan is built for each
number of sequences, longest length and token total. `CudnnAttention` rounds these up, so a run needs few plans.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SEQUENCE_MULTIPLE = 8
"""Batches are filled up with empty sequences to a multiple of this."""
LENGTH_MULTIPLE = 512
TOKEN_MULTIPLE = 1024

_Q, _K, _V, _O, _STATS, _DO, _DQ, _DK, _DV, _LENGTHS, _Q_ROWS, _K_ROWS, _V_ROWS = range(1, 14)


def is_available() -> bool:
    """Tell whether the package is installed."""
    return importlib.util.find_spec("cudnn") is not None


class CudnnAttention:
    """Causal attention inside each sequence of one packed micro-batch; see `training.packed_decoder.Attention`."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """Put the borders of sequences of these lengths on the device."""
        empty = -len(lengths) % SEQUENCE_MULTIPLE
        sizes = torch.tensor([*lengths, *[0] * empty], dtype=torch.int64)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        self._count = len(sizes)
        self._longest = _round_up(max(lengths), LENGTH_MULTIPLE)
        block = torch.cat([sizes, starts])
        block = (block.pin_memory() if device.type == "cuda" else block).to(device, non_blocking=True)
        self._lengths = block[: self._count].int()
        self._starts = block[self._count :]
        self._rows: dict[int, Tensor] = {}

    def __call__(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, *, scale: float) -> Tensor:
        """Return [T, H, K], for autograd."""
        attended: Tensor = _Attend.apply(q_THK, k_THK, v_THK, self, scale)  # type: ignore[no-untyped-call]  # torch's is untyped
        return attended

    def forward(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Return [T, H, K], and the log-sum-exp of every query."""
        heads, kv_heads, head_dim = q_THK.shape[1], k_THK.shape[1], q_THK.shape[2]
        v_THK = with_adjacent_heads(v_THK)
        shape = (self._count, self._longest, heads, kv_heads, head_dim, v_THK.stride(0))
        graph, workspace = _forward_plan(q_THK.device, shape, scale)
        output = torch.empty_like(q_THK)
        stats = torch.empty((self._count, heads, self._longest, 1), dtype=torch.float32, device=q_THK.device)
        tensors = {_Q: q_THK, _K: k_THK, _V: v_THK, _O: output, _STATS: stats} | self._borders(q_THK, k_THK, v_THK)
        _execute(graph, tensors, workspace)
        return output, stats

    def backward(
        self, grad_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, output_THK: Tensor, saved: Tensor, *, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries, keys and values."""
        heads, kv_heads, head_dim = q_THK.shape[1], k_THK.shape[1], q_THK.shape[2]
        v_THK = with_adjacent_heads(v_THK)
        shape = (self._count, self._longest, heads, kv_heads, head_dim, v_THK.stride(0))
        num_tokens = _round_up(len(q_THK), TOKEN_MULTIPLE)
        deterministic = torch.are_deterministic_algorithms_enabled()
        graph, workspace = _backward_plan(q_THK.device, shape, num_tokens, scale, deterministic)
        grad_q, grad_k, grad_v = torch.empty_like(q_THK), torch.empty_like(k_THK), torch.empty_like(k_THK)
        tensors = {_Q: q_THK, _K: k_THK, _V: v_THK, _O: output_THK, _DO: grad_THK, _STATS: saved}
        tensors |= {_DQ: grad_q, _DK: grad_k, _DV: grad_v} | self._borders(q_THK, k_THK, v_THK)
        _execute(graph, tensors, workspace)
        return grad_q, grad_k, grad_v

    def _borders(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> dict[int, Tensor]:
        """Return the lengths, and the element at which each sequence begins in queries, keys and values."""
        rows = {}
        for name, tensor in ((_Q_ROWS, q_THK), (_K_ROWS, k_THK), (_V_ROWS, v_THK)):
            stride = tensor.stride(0)
            if stride not in self._rows:
                self._rows[stride] = self._starts * stride
            rows[name] = self._rows[stride]
        return {_LENGTHS: self._lengths, **rows}


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: CudnnAttention, scale: float) -> Tensor:
        output, stats = attention.forward(q, k, v, scale=scale)
        ctx.save_for_backward(q, k, v, output, stats)
        ctx.attention, ctx.scale = attention, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.attention.backward(grad.contiguous(), *ctx.saved_tensors, scale=ctx.scale), None, None


def with_adjacent_heads(values_THK: Tensor) -> Tensor:
    """Return the values, copied if other heads lie between theirs: cuDNN's tests have packed sequences without such gaps only.

    Source: issue 540 of cudnn-frontend.
    """
    _, kv_heads, head_dim = values_THK.shape
    return values_THK if kv_heads == 1 or values_THK.stride(1) == head_dim else values_THK.contiguous()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _execute(graph: Any, tensors: dict[int, Tensor], workspace_bytes: int) -> None:
    device = tensors[_Q].device
    workspace = torch.empty(max(workspace_bytes, 1), dtype=torch.uint8, device=device)
    graph.execute(tensors, workspace, handle=_handle(device))


_handles: dict[torch.device, Any] = {}


def _handle(device: torch.device) -> Any:  # cudnn's own type, and the package has no annotations
    """Return cuDNN's handle for a device, at work on the current stream."""
    import cudnn  # noqa: PLC0415 - heavy, and an optional package

    if device not in _handles:
        with torch.cuda.device(device):
            _handles[device] = cudnn.create_handle()
    cudnn.set_stream(handle=_handles[device], stream=torch.cuda.current_stream(device).cuda_stream)
    return _handles[device]


class _Graph:
    """A cuDNN graph of packed tensors under construction."""

    def __init__(self, device: torch.device, shape: tuple[int, ...]) -> None:
        import cudnn  # noqa: PLC0415 - heavy, and an optional package

        self.cudnn = cudnn
        self.count, self.longest, self.heads, self.kv_heads, self.head_dim, self.v_stride = shape
        self.graph = cudnn.pygraph(
            handle=_handle(device),
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        self.lengths = self._column("lengths", _LENGTHS, self.count, cudnn.data_type.INT32)
        int64 = cudnn.data_type.INT64
        self.q_rows, self.k_rows, self.v_rows = (
            self._column(name, uid, self.count + 1, int64)
            for name, uid in (("q_rows", _Q_ROWS), ("k_rows", _K_ROWS), ("v_rows", _V_ROWS))
        )

    def queries(self, name: str, uid: int, tensor: Any = None) -> Any:
        """Return a tensor of the shape of the queries: a new input, or `tensor` as an output."""
        return self._packed(name, uid, self.heads, self.heads * self.head_dim, self.q_rows, tensor)

    def keys(self, name: str, uid: int, tensor: Any = None) -> Any:
        """Return a tensor of the shape of the keys."""
        return self._packed(name, uid, self.kv_heads, self.kv_heads * self.head_dim, self.k_rows, tensor)

    def values(self, name: str, uid: int) -> Any:
        """Return the values, whose rows have a stride."""
        return self._packed(name, uid, self.kv_heads, self.v_stride, self.v_rows, None)

    def mask(self, scale: float) -> dict[str, Any]:
        """Return the arguments that make attention causal inside each sequence."""
        return {
            "attn_scale": scale,
            "use_padding_mask": True,
            "seq_len_q": self.lengths,
            "seq_len_kv": self.lengths,
            "diagonal_alignment": self.cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }

    @property
    def stats_layout(self) -> dict[str, list[int]]:
        """Return dimensions and strides of the log-sum-exps, which are padded."""
        return {
            "dim": [self.count, self.heads, self.longest, 1],
            "stride": [self.heads * self.longest, self.longest, 1, 1],
        }

    def build(self) -> tuple[Any, int]:
        """Return the executable graph and the bytes of its workspace."""
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        return self.graph, self.graph.get_workspace_size()

    def _column(self, name: str, uid: int, size: int, data_type: Any) -> Any:
        return self.graph.tensor(name=name, dim=[size, 1, 1, 1], stride=[1, 1, 1, 1], data_type=data_type, uid=uid)

    def _packed(self, name: str, uid: int, heads: int, row: int, rows: Any, tensor: Any) -> Any:
        dim = [self.count, heads, self.longest, self.head_dim]
        stride = [self.longest * row, self.head_dim, row, 1]
        bfloat16 = self.cudnn.data_type.BFLOAT16
        if tensor is None:
            tensor = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=bfloat16, uid=uid)
        else:
            tensor.set_uid(uid).set_output(True).set_dim(dim).set_stride(stride).set_data_type(bfloat16)
        tensor.set_ragged_offset(rows)
        return tensor


@cache
def _forward_plan(device: torch.device, shape: tuple[int, ...], scale: float) -> tuple[Any, int]:
    plan = _Graph(device, shape)
    output, stats = plan.graph.sdpa(
        name="attention",
        q=plan.queries("q", _Q),
        k=plan.keys("k", _K),
        v=plan.values("v", _V),
        generate_stats=True,
        **plan.mask(scale),
    )
    plan.queries("o", _O, output)
    layout = plan.stats_layout
    stats.set_uid(_STATS).set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"])
    stats.set_data_type(plan.cudnn.data_type.FLOAT)
    return plan.build()


@cache
def _backward_plan(
    device: torch.device, shape: tuple[int, ...], num_tokens: int, scale: float, deterministic: bool
) -> tuple[Any, int]:
    plan = _Graph(device, shape)
    stats = plan.graph.tensor(name="stats", data_type=plan.cudnn.data_type.FLOAT, uid=_STATS, **plan.stats_layout)
    dq, dk, dv = plan.graph.sdpa_backward(
        name="attention_backward",
        q=plan.queries("q", _Q),
        k=plan.keys("k", _K),
        v=plan.values("v", _V),
        o=plan.queries("o", _O),
        dO=plan.queries("do", _DO),
        stats=stats,
        max_total_seq_len_q=num_tokens,
        max_total_seq_len_kv=num_tokens,
        use_deterministic_algorithm=deterministic,
        **plan.mask(scale),
    )
    plan.queries("dq", _DQ, dq)
    plan.keys("dk", _DK, dk)
    plan.keys("dv", _DV, dv)
    return plan.build()
