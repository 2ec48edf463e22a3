"""What one rank answers to each call; the learner is one that notes."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from qwench.cluster import rank_host
from qwench.cluster.buckets import PackedBucket, unpack
from qwench.cluster.messages import Answer, Call, Failure
from qwench.cluster.rank_host import RankHost
from qwench.training.learner import Learned

BUCKETS = [[("a", torch.ones(2))], [("b", torch.zeros(3))]]


class NotingState:
    def __init__(self) -> None:
        self.noted: list[tuple[object, ...]] = []

    def weights(self, *, bucket_bytes: int, part: object):
        self.noted.append(("weights", bucket_bytes, part))
        return iter(BUCKETS)

    def close(self) -> None:
        self.noted.append(("close",))


class NotingLearner:
    def __init__(self, timer) -> None:
        self.state, self.timer = NotingState(), timer

    def learn(self, rollout: object) -> Learned:
        with self.timer.phase("train"):
            return Learned(metrics={"train/loss": rollout}, steps=[{"x": 1.0}])

    def log_probs(self, *given: object) -> object:
        return given


@pytest.fixture
def left(monkeypatch) -> list[str]:
    told = list[str]()
    monkeypatch.setattr(rank_host, "leave_process_group", lambda: told.append("left"))
    monkeypatch.setattr(gc, "freeze", lambda: told.append("frozen"))
    return told


def ask(host: RankHost, method: str, *arguments: object) -> object:
    answer = host.answer(Call(method=method, arguments=arguments))
    assert isinstance(answer, Answer), answer
    return answer.value


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_answers_for_all_where_all_say_the_same(rank, left):
    host = RankHost(rank, exchange_folder=None)
    assert isinstance(failed := host.answer(Call(method="learn", arguments=("r",))), Failure)
    assert "build comes first" in str(failed.error)
    assert ask(host, "next_bucket") is False
    assert ask(host, "build", NotingLearner) is None and left == ["frozen"]
    assert ask(host, "log_probs", ["s"], 0.5, "policy") == ((["s"], 0.5, "policy") if rank == 0 else None)
    learned = ask(host, "learn", 3.0)
    assert learned.metrics["train/loss"] == 3.0 and learned.steps == [{"x": 1.0}]
    assert "perf/train_time" in learned.metrics
    assert not {"perf/step_time", "perf/wait_time_ratio"} & learned.metrics.keys(), "the driver measures them"
    ask(host, "open_weights", 64, "all")
    for bucket in BUCKETS:
        sent = ask(host, "next_bucket")
        assert sent is True if rank else isinstance(sent, PackedBucket)
        if rank == 0:
            ((name, tensor),) = unpack(sent)
            assert name == bucket[0][0] and torch.equal(tensor, bucket[0][1])
    assert ask(host, "next_bucket") is False
    assert ask(host, "run", lambda state, *more: (state.noted[:], more), 1, 2) == ([("weights", 64, "all")], (1, 2))
    state = host._learner.state
    for _ in range(2):
        ask(host, "close")
    assert state.noted[1:] == [("close",)] and left == ["frozen", "left", "left"]


def test_only_buckets_of_the_first_rank_go_through_its_folder(left, tmp_path, monkeypatch):
    packed = []
    monkeypatch.setattr(rank_host, "pack", lambda bucket, *, folder: packed.append((bucket, folder)))
    for rank in (0, 1):
        host = RankHost(rank, exchange_folder=tmp_path)
        host.build(lambda timer: SimpleNamespace(state=NotingState()))
        host.open_weights(64, "all")
        host.next_bucket()
    assert packed == [(BUCKETS[0], tmp_path)]
