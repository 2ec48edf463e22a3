"""Copies between the device and pinned buffers on the host, ahead of and behind the work that needs them.

    gradients --copy--> slot.gradients --work on the host--> slot.weights --copy--> weights
    overlapped: copy of bucket i + 1 | work on bucket i | copy of bucket i - 1;  otherwise: one after the other

The host's work is the same in both, and in the same order, so that the results are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Elements [start, stop) of a flattened parameter."""

    param: Tensor
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return these elements of a tensor of the parameter's shape, sharing its memory."""
        return tensor.detach().view(-1)[self.start : self.stop]


def buckets_of(params: Sequence[Tensor], *, max_elements: int) -> list[list[Span]]:
    """Cut `params` into buckets of at most `max_elements`, in order; a parameter may begin in one and end in another."""
    buckets: list[list[Span]] = []
    room = 0
    for param in params:
        start = 0
        while start < param.numel():
            # A cut inside of a parameter is at a multiple of max_elements, so that vector kernels see the same lanes.
            stop = min(start + max_elements, param.numel())
            if stop - start > room:
                buckets.append([])
                room = max_elements
            buckets[-1].append(Span(param=param, start=start, stop=stop))
            room -= stop - start
            start = stop
    return buckets


class _Slot:
    """Buffers of one bucket in flight."""

    def __init__(self, num_elements: int, weight_dtype: torch.dtype, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.gradients = torch.empty(num_elements, dtype=torch.float32, pin_memory=pinned)
        self.weights = torch.empty(num_elements, dtype=weight_dtype, pin_memory=pinned)
        self.fetched = _Mark(device)
        self.sent = _Mark(device)


class _Mark:
    """A point in the order of copies that the host can wait for; on a CPU, every copy is finished when it returns."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def set(self) -> None:
        """Mark the work queued on the current stream so far."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Make the host wait for the last mark, if one was set."""
        if self._event is not None:
            self._event.synchronize()


class _Lane:
    """The stream of the copies in one direction: a separate stream, or the current one."""

    def __init__(self, device: torch.device, *, apart: bool) -> None:
        self._stream = torch.cuda.Stream(device) if apart and device.type == "cuda" else None

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Queue the copies made inside here, in order."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def follow(self) -> None:
        """Make later copies wait for the work queued on the current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def lead(self) -> None:
        """Make the current stream wait for the copies queued so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


Work = Callable[[Sequence[Span], Sequence[Tensor], Sequence[Tensor]], None]
"""(bucket, its gradients, where its new weights go) -> None; both on the host and flat, one per span."""


class HostCopies:
    """Buffers and streams of one optimizer; `run` brings buckets to the host and back."""

    def __init__(self, *, max_elements: int, weight_dtype: torch.dtype, device: torch.device, overlap: bool) -> None:
        """Pin memory for buckets of `max_elements`; with `overlap` for three of them, one in each stage."""
        num_slots = 3 if overlap else 1
        self._slots = [_Slot(max_elements, weight_dtype, device) for _ in range(num_slots)]
        self._to_host = _Lane(device, apart=overlap)
        self._to_device = _Lane(device, apart=overlap)

    def run(self, buckets: Sequence[Sequence[Span]], gradient: Callable[[Tensor], Tensor], work: Work) -> None:
        """Do `work` on every bucket; work queued on the current stream after the return sees the new weights.

        Args:
            buckets: At most `max_elements` each.
            gradient: Parameter -> its float32 gradient on the device, complete on the current stream.
            work: Done by the host, bucket after bucket.
        """
        self._to_host.follow()
        num_fetched = 0
        for index, bucket in enumerate(buckets):
            slot = self._slots[index % len(self._slots)]
            # A slot is filled again once the work on its last gradients is done: that of all buckets before this one.
            while num_fetched < min(index + len(self._slots), len(buckets)):
                self._fetch(buckets[num_fetched], self._slots[num_fetched % len(self._slots)], gradient)
                num_fetched += 1
            slot.fetched.wait()
            slot.sent.wait()
            work(bucket, cut(slot.gradients, bucket), cut(slot.weights, bucket))
            self._send(bucket, slot)
        self._to_device.lead()

    def _fetch(self, bucket: Sequence[Span], slot: _Slot, gradient: Callable[[Tensor], Tensor]) -> None:
        with self._to_host.copying():
            for span, staged in zip(bucket, cut(slot.gradients, bucket), strict=True):
                staged.copy_(span.of(gradient(span.param)), non_blocking=True)
            slot.fetched.set()

    def _send(self, bucket: Sequence[Span], slot: _Slot) -> None:
        with self._to_device.copying():
            for span, staged in zip(bucket, cut(slot.weights, bucket), strict=True):
                span.of(span.param).copy_(staged, non_blocking=True)
            slot.sent.set()


def cut(buffer: Tensor, bucket: Sequence[Span]) -> Sequence[Tensor]:
    """Return one piece of a flat buffer for each span, back to back."""
    sizes = [span.stop - span.start for span in bucket]
    pieces: tuple[Tensor, ...] = buffer[: sum(sizes)].split(sizes)
    return pieces
