"""In which order gradients and weights cross the bus, and what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from qwench.training.optimizers import pinned_buckets
from qwench.training.optimizers.pinned_buckets import HostCopies, Span, buckets_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_buckets_are_full_and_cut_parameters_at_their_size() -> None:
    params = [torch.zeros(5), torch.zeros(3), torch.zeros(2), torch.zeros(0)]
    cuts = [
        [(next(i for i, one in enumerate(params) if one is span.param), span.start, span.stop) for span in bucket]
        for bucket in buckets_of(params, max_elements=4)
    ]
    assert cuts == [[(0, 0, 4)], [(0, 4, 5), (1, 0, 3)], [(2, 0, 2)]]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what the host queues and waits for, by the number of the mark or lane."""
    said: list[str] = []

    class Mark:
        def __init__(self, device: torch.device) -> None:
            self.number = next(numbers)

        def set(self) -> None:
            said.append(f"set {self.number}")

        def wait(self) -> None:
            said.append(f"wait {self.number}")

    class Lane:
        def __init__(self, device: torch.device, *, apart: bool) -> None:
            self.number = next(lanes)

        def follow(self) -> None:
            said.append(f"follow {self.number}")

        def lead(self) -> None:
            said.append(f"lead {self.number}")

        @contextmanager
        def copying(self) -> Iterator[None]:
            said.append(f"to {('host', 'device')[self.number]}")
            yield

    numbers, lanes = count(), count()
    monkeypatch.setattr(pinned_buckets, "_Mark", Mark)
    monkeypatch.setattr(pinned_buckets, "_Lane", Lane)
    return said


@pytest.mark.parametrize("overlap", [False, True])
def test_work_begins_when_its_gradients_are_there_and_its_buffer_is_free(overlap: bool, events: list[str]) -> None:
    params = [torch.zeros(2, dtype=torch.bfloat16) for _ in range(4)]
    copies = HostCopies(max_elements=2, weight_dtype=torch.bfloat16, device=CPU, overlap=overlap)

    def work(bucket: list[Span], gradients: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        events.append("work")
        weights[0].copy_(gradients[0])

    numbers = {id(param): i for i, param in enumerate(params)}
    copies.run(buckets_of(params, max_elements=2), lambda param: torch.full((2,), 1.0 + numbers[id(param)]), work)
    assert [param.tolist() for param in params] == [[1.0 + i] * 2 for i in range(4)]
    fetched = [f"set {2 * slot}" for slot in (0, 1, 2)]
    first = ["follow 0", "to host", fetched[0]]
    if overlap:  # all three slots are filled before the first work, and the first again after the work on it
        begin = [*first, "to host", fetched[1], "to host", fetched[2], *_bucket(0), "to host", fetched[0]]
        assert events == [*begin, *_bucket(1), *_bucket(2), *_bucket(0), "lead 1"]
    else:
        assert events == [*first, *_bucket(0), *(["to host", fetched[0], *_bucket(0)] * 3), "lead 1"]


def _bucket(slot: int) -> list[str]:
    return [f"wait {2 * slot}", f"wait {2 * slot + 1}", "work", "to device", f"set {2 * slot + 1}"]


def test_marks_and_lanes_are_events_and_streams_of_a_gpu_and_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    event = SimpleNamespace(record=lambda: said.append("record"), synchronize=lambda: said.append("synchronize"))

    def stream(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, device=GPU, wait_stream=lambda other: said.append((name, "waits for", other.name)))

    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream("apart"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda one: said.append(("on", one.name)) or nullcontext())
    for device, apart in ((CPU, True), (GPU, False), (GPU, True)):
        lane = pinned_buckets._Lane(device, apart=apart)
        lane.follow()
        with lane.copying():
            said.append("copy")
        lane.lead()
    assert said == [
        "copy",
        "copy",
        ("apart", "waits for", "current"),
        ("on", "apart"),
        "copy",
        ("current", "waits for", "apart"),
    ]
    said.clear()
    for device in (CPU, GPU):
        mark = pinned_buckets._Mark(device)
        mark.set()
        mark.wait()
    assert said == ["record", "synchronize"]
