"""Which phases of which rollouts and ranks are traced."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from qwench.config.sections.debug import ProfilingConfig
from qwench.training.profiler import TrainProfiler


def run(folder: Path, *, rank: int = 0, **flags: object) -> dict[str, set[str]]:
    """Return the names of operations in each trace of four rollouts: a multiplication to score, an addition to train."""
    profiler = TrainProfiler(ProfilingConfig(use_pytorch_profiler=True, **flags), folder, rank=rank)  # type: ignore[arg-type]
    one = torch.ones(2)
    for _ in range(4):
        with profiler.rollout():
            with profiler.phase("train_log_probs"):
                torch.mul(one, one)
            with profiler.phase("train_actor"):
                torch.add(one, one)
    found = {}
    for path in folder.glob("*.pt.trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found[path.name.partition(".")[0]] = {event["name"] for event in events} & {"aten::mul", "aten::add"}
    return found


def test_the_rollouts_from_start_to_end_are_traced_whole(tmp_path: Path) -> None:
    both = {"aten::mul", "aten::add"}
    found = run(tmp_path, profile_step_start=1, profile_step_end=3)
    assert found == {"train_overall_rank0_00001": both, "train_overall_rank0_00002": both}


def test_a_target_is_traced_alone_on_the_ranks_that_are_named(tmp_path: Path) -> None:
    flags = {"profile_step_start": 0, "profile_step_end": 1, "profile_ranks": (1, 2)}
    assert run(tmp_path / "a", rank=0, **flags) == {}
    targets = ("train_actor", "train_log_probs")
    assert run(tmp_path / "b", rank=2, **flags, profile_target=targets) == {
        "train_actor_rank2_00000": {"aten::add"},
        "train_log_probs_rank2_00000": {"aten::mul"},
    }


def test_a_target_that_no_rollout_reaches_is_named_when_the_traced_ones_are_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = ProfilingConfig(
        use_pytorch_profiler=True,
        profile_target=("train_actor", "train_log_probs"),
        profile_step_start=1,
        profile_step_end=3,
        profile_ranks=(0, 1),
    )
    said = []
    for rank in (0, 1):
        profiler = TrainProfiler(section, tmp_path, rank=rank)
        for _ in range(4):
            with profiler.rollout(), profiler.phase("train_actor"):
                torch.add(torch.ones(2), torch.ones(2))
            said.append([record.getMessage() for record in caplog.records if record.levelname == "WARNING"])
            caplog.clear()
    message = "--profile-target train_log_probs has written nothing: rollouts 1 to 2 of this start had no such pass"
    assert said == [[], [], [message], [], [], [], [message], []]


def test_memory_is_recorded_until_its_rollout_and_written_by_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **flags: calls.append(flags.get("enabled", "on")))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    observers: list[Callable[..., None]] = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    flags = {"memory_snapshot_dir": tmp_path / "m", "memory_snapshot_path": Path("s.pickle"), "memory_snapshot_num_steps": 2}
    profiler = TrainProfiler(ProfilingConfig(record_memory_history=True, **flags, profile_ranks=(3,)), tmp_path, rank=3)
    TrainProfiler(ProfilingConfig(record_memory_history=True, **flags), tmp_path, rank=3)
    written = str(tmp_path / "m" / "rank3_s.pickle")
    for expected in (["on"], ["on", written, None]):
        with profiler.rollout():
            pass
        assert calls == expected
    [observer] = observers
    observer(0, 1, 2, 3)  # as torch calls it: device and sizes
    assert calls[3:] == [written]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_trace_records_what_the_flags_ask_for(on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: asked.append(options) or nullcontext())
    monkeypatch.setattr(torch.profiler, "tensorboard_trace_handler", lambda *given, **options: (given, options))
    shapes = {"pytorch_profiler_collect_shapes": True, "pytorch_profiler_collect_callstack": False}
    section = ProfilingConfig(use_pytorch_profiler=True, profile_step_start=0, profile_step_end=1, **shapes)
    profiler = TrainProfiler(section, tmp_path, rank=0)
    with profiler.rollout(), profiler.phase("train_actor"):
        pass
    kinds = torch.profiler.ProfilerActivity
    whole = {
        "activities": [kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU],
        "on_trace_ready": ((str(tmp_path),), {"worker_name": "train_overall_rank0_00000", "use_gzip": True}),
        "record_shapes": True,
        "with_stack": False,
        "profile_memory": True,
    }
    assert asked == [whole]
