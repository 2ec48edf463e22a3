"""How many pages of KV cache an engine takes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from qwench.config.sections.engine import EngineConfig
from qwench.engines.embedded.compute import kv_memory, runner
from qwench.engines.embedded.compute.runner import Runner
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.errors import EngineError

GIB = 2**30


def pages(
    device: str = "cpu", *, max_positions: int = 1000, asleep: object = None, release: Callable[[], None] = int, **sizes: object
) -> int:
    """Return what a runner chooses for pages of 16 tokens and 4 requests at once."""
    engine = EngineConfig(embedded_page_size=16, embedded_max_running_requests=4, **sizes)
    settings = EmbeddedSettings(sizes=engine, device=device, dtype=torch.bfloat16)
    model = SimpleNamespace(max_positions=max_positions)
    made = SimpleNamespace(
        _settings=settings,
        _architecture=model,
        _device=torch.device(device),
        _kv_cache=asleep,
        release_cached_memory=release,
    )
    return Runner.choose_num_pages(made)


def test_a_cpu_takes_what_is_asked_or_a_fixed_number_of_tokens_but_no_more_than_fit_into_requests():
    whole = 1 + 4 * 63  # 1000 positions need 63 pages, and one is scratch
    assert [pages(), pages(max_positions=10**6)] == [whole, 1 + 65_536 // 16]
    asked = [pages(embedded_kv_cache_tokens=tokens) for tokens in (16, 17, 10**6)]
    assert asked == [2, 3, whole]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Play a GPU of 10 GiB of which 5 are free, and pages of 1 MiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 10 * GIB))
    monkeypatch.setattr(runner, "page_bytes", lambda architecture, page_size, dtype: page_size * dtype.itemsize * 2**15)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_takes_what_is_free_beyond_its_reserve():
    whole = 10**6
    assert pages("cuda:0", max_positions=whole, embedded_mem_fraction=0.75) == 1 + 2560
    assert pages("cuda:0", embedded_mem_fraction=0.75) == 1 + 4 * 63
    with pytest.raises(EngineError, match=r"5\.0 of 10\.0 GiB are free on cuda:0 and --embedded-mem-fraction 0\.5 allows no"):
        pages("cuda:0", max_positions=whole, embedded_mem_fraction=0.5)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("num_bytes", "kept"), [(15 * GIB // 4, True), (15 * GIB // 4 + 1, False)])
def test_a_cache_that_slept_gets_its_pages_back_where_half_of_the_reserve_is_left(num_bytes, kept):
    asleep = SimpleNamespace(num_bytes=num_bytes, num_pages=77)
    found = pages("cuda:0", max_positions=10**6, asleep=asleep, embedded_mem_fraction=0.75)
    assert found == (77 if kept else 1 + 2560)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("num_bytes", "kept", "released"), [(15 * GIB // 4, True, 0), (15 * GIB // 4 + 1, True, 1), (None, False, 1)]
)
def test_what_torch_caches_is_given_back_only_where_the_pages_do_not_fit_beside_it(monkeypatch, num_bytes, kept, released):
    releases = list[int]()

    def release() -> None:
        releases.append(1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB, 10 * GIB))

    asleep = None if num_bytes is None else SimpleNamespace(num_bytes=num_bytes, num_pages=77)
    found = pages("cuda:0", max_positions=10**6, asleep=asleep, release=release, embedded_mem_fraction=0.75)
    assert found == (77 if kept else 1 + (8 * 1024 - 2560))
    assert len(releases) == released


@pytest.mark.parametrize(
    ("device", "num_bytes", "emptied"), [("cuda", 3, False), ("cuda", 3 + 2**-30, True), ("cpu", 9, False)]
)
def test_the_cache_is_emptied_where_memory_and_a_reserve_of_2_gib_are_not_free(monkeypatch, device, num_bytes, emptied):
    calls = list[str]()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 10 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    kv_memory.make_room(int(num_bytes * GIB), torch.device(device))
    assert calls == ["empty"] * emptied


@pytest.mark.parametrize(("num_pages", "expected"), [(5, ["room for 70", "wake"]), (6, ["release", "new of 6"])])
def test_room_is_made_before_the_kv_cache_is_taken(monkeypatch, num_pages, expected):
    events = list[str]()
    asleep = SimpleNamespace(num_pages=5, num_bytes=70, is_asleep=True, wake=lambda: events.append("wake"))
    monkeypatch.setattr(runner, "make_room", lambda num_bytes, device: events.append(f"room for {num_bytes}"))
    monkeypatch.setattr(runner, "KVCache", lambda model, num_pages, **_: events.append(f"new of {num_pages}"))
    settings = EmbeddedSettings(sizes=EngineConfig(embedded_page_size=16, embedded_max_running_requests=4))
    made = SimpleNamespace(
        _settings=settings,
        _architecture=SimpleNamespace(max_positions=1000),
        _device=torch.device("cpu"),
        _kv_cache=asleep,
        _adapters=None,
        release_cached_memory=lambda: events.append("release"),
    )
    monkeypatch.setattr(runner, "RowAdapters", lambda *_: None)
    Runner.allocate_kv_cache(made, num_pages)
    assert events == expected


@pytest.mark.parametrize("is_asleep", [True, False])
def test_a_runner_that_sleeps_gives_back_what_torch_caches_after_the_kv_cache(is_asleep):
    events = list[str]()
    kept = SimpleNamespace(is_asleep=is_asleep, sleep=lambda: events.append("sleep"))
    Runner.sleep(SimpleNamespace(_kv_cache=kept, release_cached_memory=lambda: events.append("release")))
    assert events == [*["sleep"] * (not is_asleep), "release"]
