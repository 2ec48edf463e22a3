# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: ANN001, ANN202 - in kernels, annotations mean something else to Triton
"""Sums over the ranks of an engine without NCCL: each GPU reads the others' memory, in one kernel with the norm after the sum.

One program has a row. It stores its part of the row where the other GPUs can read it, tells the programs of the same row there
that it has, waits until those have told it the same, and adds up all parts in the order of the ranks:

    memory of rank r:  [signals: buffer, row, rank | parts of buffer 0 [rows, D] | parts of buffer 1 [rows, D]]

A signal is 1 from the write of its sender until its receiver has seen it. The two buffers take turns within a forward pass,
so that a part is overwritten only after a wait at the other buffer, which every rank reaches after it has read.
Between passes there is a collective. Of n ranks each reads n - 1 parts: less latency than a ring's, and more bytes, therefore
only of few rows.
Source: one-shot all-reduce of TensorRT-LLM and vLLM; PyTorch's symmetric memory has it without the norm.
"""

from __future__ import annotations

import os
from multiprocessing import reduction
from multiprocessing.connection import Connection

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwench.engines.embedded.compute.mapped_memory import MappedMemory, can_share
from qwench.errors import EngineError
from qwench.models.decoder.early_launch import OPTIONS, wait_for_kernel_before

MAX_ROWS = 512
MAX_READ_BYTES = 8 << 20
"""Of all other ranks' parts. NCCL moves more bytes in less time."""
_BUFFERS = 2
_TIMEOUT_S = 60.0
_ALIGNMENT = 256


def is_possible(num_devices: int) -> bool:
    """Tell whether the first GPUs reach each other's memory; every rank finds the same."""
    devices = range(num_devices)
    reach = all(torch.cuda.can_device_access_peer(one, other) for one in devices for other in devices if one != other)
    return reach and all(map(can_share, devices))


class PeerSums:
    """This rank's memory for parts, and the other ranks'."""

    def __init__(self, *, rank: int, size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take the memory of this rank; `map_peers` comes next."""
        self._rank, self._size = rank, size
        num_signals = _BUFFERS * MAX_ROWS * size
        self._buffer_bytes = MAX_ROWS * hidden_size * dtype.itemsize
        self._parts_at = -(-(4 * num_signals) // _ALIGNMENT) * _ALIGNMENT
        self._num_bytes = self._parts_at + _BUFFERS * self._buffer_bytes
        self._device = device
        self._memory = [MappedMemory(self._num_bytes, device, shared=True) for _ in range(size)]
        own = self._memory[rank]
        own.take()
        own.as_tensor().zero_()
        self._given_up = torch.zeros(1, dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.int32).pin_memory()
        torch.cuda.synchronize(device)
        self._addresses: Tensor | None = None

    def descriptor(self) -> int:
        """Return a file descriptor of this rank's memory; the receiver closes it."""
        return self._memory[self._rank].descriptor()

    def map_peers(self, descriptors: list[int]) -> None:
        """Map the memory of the others, given the descriptors of all ranks but this one, in order."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        for rank, descriptor in zip(others, descriptors, strict=True):
            self._memory[rank].take_from(descriptor)
        addresses = [memory.address for memory in self._memory]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=self._device)

    def can_sum(self, part_TD: Tensor) -> bool:
        """Tell whether a sum of these parts [T, D] is for `add_rms_norm`."""
        read = part_TD.numel() * part_TD.element_size() * (self._size - 1)
        return 0 < len(part_TD) <= MAX_ROWS and read <= MAX_READ_BYTES

    def add_rms_norm(
        self, x_TD: Tensor, part_TD: Tensor, weight_D: Tensor, eps: float, *, buffer: int
    ) -> tuple[Tensor, Tensor]:
        """Return x plus the sum of all ranks' parts, and its norm; see `elementwise.add_rms_norm`.

        Args:
            buffer: 0 and 1 in turns; see above.
        """
        assert self._addresses is not None, "map_peers() comes first"
        num_rows, size = x_TD.shape
        summed, normed = torch.empty((2, num_rows, size), dtype=x_TD.dtype, device=x_TD.device)
        block = triton.next_power_of_2(size)
        _add_rms_norm_of_parts[(num_rows,)](
            x_TD,
            part_TD,
            weight_D,
            summed,
            normed,
            self._addresses,
            self._given_up,
            x_TD.stride(0),
            part_TD.stride(0),
            buffer * MAX_ROWS * self._size,
            self._parts_at + buffer * self._buffer_bytes,
            eps,
            RANK=self._rank,
            RANKS=self._size,
            SIZE=size,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **OPTIONS,
        )
        return summed, normed

    def give_up(self) -> None:
        """Let kernels that wait for a rank end, with wrong sums."""
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            self._given_up.copy_(self._one, non_blocking=True)  # by the copy engine: kernels may hold every processor


def join(
    pipes: list[Connection], *, rank: int, size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> PeerSums | None:
    """Share memory with the other ranks; see `RankGroup.share_memory`. None: the GPUs do not reach each other's memory."""
    if not is_possible(size):
        return None
    sums = PeerSums(rank=rank, size=size, hidden_size=hidden_size, dtype=dtype, device=device)
    try:
        if rank == 0:
            _exchange_as_leader(sums, pipes)
        else:
            _exchange_as_follower(sums, pipes[0], size)
    except (OSError, EOFError) as cause:
        raise EngineError(f"rank {rank} of the engine shared no memory with the others: {cause}") from cause
    return sums


def _exchange_as_leader(sums: PeerSums, pipes: list[Connection]) -> None:
    descriptors = [sums.descriptor()]
    for rank, pipe in enumerate(pipes, start=1):
        if not pipe.poll(_TIMEOUT_S):
            raise EngineError(f"rank {rank} of the engine shared no memory within {_TIMEOUT_S:g} s.")
        descriptors.append(reduction.recv_handle(pipe))
    for rank, pipe in enumerate(pipes, start=1):
        for descriptor in descriptors[:rank] + descriptors[rank + 1 :]:
            reduction.send_handle(pipe, descriptor, None)
    own, *others = descriptors
    os.close(own)
    sums.map_peers(others)


def _exchange_as_follower(sums: PeerSums, pipe: Connection, size: int) -> None:
    own = sums.descriptor()
    reduction.send_handle(pipe, own, None)
    os.close(own)
    sums.map_peers([reduction.recv_handle(pipe) for _ in range(size - 1)])


@triton.jit
def _add_rms_norm_of_parts(
    x_pointer,
    part_pointer,
    weight_pointer,
    summed_pointer,
    normed_pointer,
    address_pointer,
    given_up_pointer,
    x_stride,
    part_stride,
    signals_at,
    parts_at,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`signals_at` counts signals, `parts_at` bytes."""
    wait_for_kernel_before()
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < SIZE
    dtype: tl.constexpr = normed_pointer.dtype.element_ty
    own = tl.load(address_pointer + RANK)
    part = tl.load(part_pointer + row * part_stride + column, mask=inside, other=0.0)
    own_parts = tl.multiple_of((own + parts_at).to(tl.pointer_type(dtype)), 16)
    tl.store(own_parts + row * SIZE + column, part, mask=inside)
    tl.debug_barrier()
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            theirs = tl.load(address_pointer + rank).to(tl.pointer_type(tl.int32)) + signals_at + row * RANKS + RANK
            while (tl.atomic_cas(theirs, 0, 1, sem="release", scope="sys") != 0) & (
                tl.load(given_up_pointer, volatile=True) == 0
            ):
                pass
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            mine = own.to(tl.pointer_type(tl.int32)) + signals_at + row * RANKS + rank
            while (tl.atomic_cas(mine, 1, 0, sem="acquire", scope="sys") != 1) & (
                tl.load(given_up_pointer, volatile=True) == 0
            ):
                pass
    tl.debug_barrier()
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += part.to(tl.float32)
        else:
            parts = tl.multiple_of((tl.load(address_pointer + rank) + parts_at).to(tl.pointer_type(dtype)), 16)
            total += tl.load(parts + row * SIZE + column, mask=inside, other=0.0, volatile=True).to(tl.float32)
    x = tl.load(x_pointer + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_pointer + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (x + total.to(dtype).to(tl.float32)).to(dtype)
    tl.store(summed_pointer + row * SIZE + column, rounded, mask=inside)
    x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    tl.store(normed_pointer + row * SIZE + column, (x * scale * weight).to(dtype), mask=inside)
